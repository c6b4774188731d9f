"""Whether a recording or a replay failed because a GPU's memory ran short."""

from __future__ import annotations

from pyralis.ops._shortage import ran_short


def is_shortage(error: BaseException) -> bool:
    """`ran_short` of a recording or a replay. Ending the capture that it broke may have raised another error; what CUDA
    itself could not have (for the nodes of a graph, say) comes as an error of no class of its own."""
    found: BaseException | None = error
    while found is not None:
        if ran_short(found) or "out of memory" in str(found):
            return True
        found = found.__cause__ or found.__context__
    return False
