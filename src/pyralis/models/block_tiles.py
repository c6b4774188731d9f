"""The MLP of the fused block over tiles of tokens, for contexts whose gate, up and their product are too large at once.

Of the whole context there are the residual stream and what attention needs; [T, I] arrays exist for one tile at a time.
The MLP is of each token alone, so outputs and the input's gradient are those of the whole; gradients of weights are
sums over tiles, from the first to the last. Dropout's masks are counted from the first row of a call: with dropout in
the MLP it stays whole.

Shapes as in `block_forward.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyralis.models.block_glu import drops
from pyralis.models.block_mlp import kept_input, mlp_backward, mlp_output, to_gate_up_again, to_product
from pyralis.models.block_parts import Activations, Context, Stats
from pyralis.models.gradient_sums import in_parts
from pyralis.models.gradients import FlatGradients
from pyralis.models.policy import RECOMPUTING, SavePolicy


def tile_for(c: Context, policy: SavePolicy, tile: int | None, tokens: int) -> int | None:
    """Tokens of a tile, or None where the MLP runs whole: by policy, with dropout in it, or as one tile holds all."""
    if tile is None or policy not in RECOMPUTING or tile >= tokens:
        return None
    return None if any(drops(c, group) for group in (c.state.gate_up, c.state.down)) else tile


def mlp_in_tiles(c: Context, x: Tensor, branch: Tensor, tile: int) -> tuple[Tensor, Activations]:
    """(the layer's output [T, H], what of the down projection the backward may read).

    x: the layer's input; branch: what attention adds to it, which is overwritten.
    """
    y, whole = torch.empty_like(x), Activations()
    for rows in _tiles(len(x), tile):
        _forward(c, x, branch, rows, y, whole)
    return y, whole


def mlp_backward_in_tiles(
    c: Context, whole: Activations, x: Tensor, branch: Tensor, flat: FlatGradients, dy: Tensor, tile: int
) -> Tensor:
    """The gradient of the residual stream before the MLP, [T, H]; in the memory of `branch` where dtypes allow."""
    sums = in_parts(flat, c.state.parameters)
    dh = branch if branch.dtype == x.dtype else torch.empty_like(x)
    for rows in _tiles(len(x), tile):
        _backward(c, whole, x, branch, rows, sums, dy, dh)
    sums.write_sums()
    whole.d = whole.xa4 = whole.u4 = None
    return dh


def _tiles(tokens: int, tile: int) -> Iterator[slice]:
    for start in range(0, tokens, tile):
        yield slice(start, min(start + tile, tokens))


def _forward(c: Context, x: Tensor, branch: Tensor, rows: slice, y: Tensor, whole: Activations) -> None:
    a = Activations(x=x[rows])
    to_product(c, a, branch[rows])
    y[rows] = mlp_output(c, a)
    if a.d is not None:
        whole.d = _put(whole.d, a.d, rows, len(x))
        before = whole.d_stats or (None,) * len(a.d_stats)
        whole.d_stats = tuple(_put(old, new, rows, len(x)) for old, new in zip(before, a.d_stats))
    _, xa4 = kept_input(c.state.down, None, a.xa4, keep=False)
    if xa4 is not None:
        whole.xa4 = _put(whole.xa4, xa4, rows, len(x))
    if a.u4 is not None and c.state.down.trained.reads_product:
        whole.u4 = _put(whole.u4, a.u4, rows, len(x))


def _backward(
    c: Context, whole: Activations, x: Tensor, branch: Tensor, rows: slice, flat: FlatGradients, dy: Tensor, dh: Tensor
) -> None:
    """Fills these rows of dh, which may be those of `branch`: nothing reads them any more."""
    stats: Stats = tuple(each[rows] for each in whole.d_stats)
    left = Activations(d=_get(whole.d, rows), d_stats=stats, xa4=_get(whole.xa4, rows), u4=_get(whole.u4, rows))
    a = Activations(x=x[rows])
    to_gate_up_again(c, a, branch[rows], left)
    mlp_backward(c, a, flat, dy[rows], out=dh[rows])


def _get(whole: Tensor | None, rows: slice) -> Tensor | None:
    return None if whole is None else whole[rows]


def _put(whole: Tensor | None, part: Tensor, rows: slice, tokens: int) -> Tensor:
    """The rows of a tile in their place in a tensor of all rows, which the first tile makes."""
    if whole is None:
        whole = part.new_empty((tokens, *part.shape[1:]))
    whole[rows] = part
    return whole
