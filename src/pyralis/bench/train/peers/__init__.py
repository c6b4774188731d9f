"""The peers: what each is called, where its runner is, and what it can keep for the backward, in its own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PYRALIS = "pyralis"
KBIT = "+kbit"
GRAPH, RESIDENT = "+graph", "+resident"
_POLICIES = ("keep", "recompute_cheap", "recompute_layer", "offload_input")
_HF = ("False", "True", f"False{KBIT}", f"True{KBIT}")


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """A peer.

    Attributes:
        runner: `module:class` below this package.
        package: what has to be installed.
        variants: of gradient checkpointing, those last that change the model or the process for good; `+kbit` is
            the model after PEFT's `prepare_model_for_kbit_training`, which most guides call and TRL does not:
            embeddings, norms and head, and so the residual stream, in float32. `+graph`: steps replayed from CUDA
            graphs; `+resident`: dequantised weights are kept.
        loops: the loops that there are for it.
        warmup: steps beyond the usual ones before it is timed, since it compiles.
    """

    runner: str
    package: str
    variants: tuple[str, ...]
    defaults: tuple[str, ...]
    loops: tuple[Literal["bare", "trainer"], ...] = ("bare", "trainer")
    warmup: int = 0

    def variants_of(self, mode: str) -> tuple[str, ...]:
        """Those that there are in a mode: only 4-bit models are prepared for training in them."""
        return tuple(variant for variant in self.variants if mode == "qlora" or not variant.endswith(KBIT))


PEERS = {
    PYRALIS: PeerInfo(
        "ours:Pyralis", "pyralis",
        tuple(f"{policy}{how}" for policy in _POLICIES for how in ("", GRAPH, RESIDENT, f"{RESIDENT}{GRAPH}")),
        ("keep", f"keep{GRAPH}", "offload_input"), warmup=1,
    ),
    "hf": PeerInfo("hugging_face:HuggingFace", "transformers", _HF, ("False", "True", f"True{KBIT}")),
    "hf-compile": PeerInfo("hugging_face:Compiled", "transformers", _HF, ("False", "True"), warmup=2),
    "hf-trl": PeerInfo("hugging_face:Trl", "trl", ("False", "True"), ("True",), loops=("trainer",)),
    "liger": PeerInfo("hugging_face:Liger", "liger_kernel", _HF, ("False", "True")),
    "unsloth": PeerInfo(
        "unsloth:Unsloth", "unsloth", ("False", "True", "unsloth"), ("False", "unsloth"), warmup=2
    ),
}  # fmt: skip
