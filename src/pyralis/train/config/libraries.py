"""Libraries that fields ask for and Pyralis does not install: found missing before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pyralis.errors import ConfigError

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig

# report_to -> (module to import, package to install); any one of several modules will do
TRACKERS: dict[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
# what the name of an optimizer holds -> (module, package)
OPTIMIZERS: dict[str, tuple[str, str]] = {
    "apollo": ("apollo_torch", "git+https://github.com/zhuhanqing/APOLLO"),
    "galore": ("galore_torch", "galore-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "torch_4bit": ("torchao", "torchao"),
    "torch_8bit": ("torchao", "torchao"),
}


def check_libraries(config: TrainConfig) -> None:
    """Raise ConfigError if the config needs a library that is not installed."""
    missing = [f"{field} needs {package}" for field, modules, package in _needed(config) if not any(map(_has, modules))]
    if missing:
        packages = " ".join(dict.fromkeys(line.rpartition(" ")[2] for line in missing))
        raise ConfigError(f"{'; '.join(missing)}, which is not installed: pip install {packages}, or drop the field.")


def _needed(config: TrainConfig) -> Iterator[tuple[str, tuple[str, ...], str]]:
    trackers = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in trackers:
        if name in TRACKERS:
            yield f"report_to: {name}", *TRACKERS[name]
    for part, (module, package) in OPTIMIZERS.items():
        if part in str(config.optim):
            yield f"optim: {config.optim}", (module,), package
    if config.deepspeed:
        yield "deepspeed", ("deepspeed",), "deepspeed"
    if config.use_liger_kernel:
        yield "use_liger_kernel", ("liger_kernel",), "liger-kernel"


def _has(module: str) -> bool:
    return find_spec(module) is not None
