"""Experts of one's own are called with one expert per row: do their experts add up to what they give together?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 8
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest value; in 16 bits 0.05
_CONTRACT = (
    "A rank calls them with its own experts and one expert per row, and sums the outputs of a token: forward(hidden "
    "[tokens, size], ids [tokens, top_k], weights [tokens, top_k]) must be the sum of its experts' outputs times their "
    "weights, [tokens, size], and nothing else. Normalise weights where they are made, and do what is for a whole "
    "token (a residual, a norm, a shared expert) in the module around the experts (docs/extend/plans.md)."
)


def check_one_by_one(
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_experts: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    layer: str,
) -> None:
    """Calls experts with two of them for each of a few random rows, and with one after the other.

    Args:
        experts: Called with hidden states ``[T, H]``, ids ``[T, K]`` and weights ``[T, K]``.
        num_experts: How many there are; a single one has nothing to add up with.
        size: ``H``.
        dtype: Of hidden states and weights.
        device: Of all.
        layer: Name of the layer, for messages.

    Raises:
        ValueError: If the two calls with one do not add up to that with two, or return something else than a tensor.
    """
    if num_experts < 2:
        return
    generator = torch.Generator().manual_seed(0)
    rows_TH = torch.randn(_ROWS, size, generator=generator).to(device, dtype)
    first_T = torch.randint(num_experts, (_ROWS,), generator=generator)
    second_T = (first_T + torch.randint(1, num_experts, (_ROWS,), generator=generator)) % num_experts
    ids_TK = torch.stack((first_T, second_T), dim=1).to(device)
    weights_TK = (torch.rand(_ROWS, 2, generator=generator) + 0.25).to(device, dtype)
    with torch.no_grad():
        together, *alone = (experts(rows_TH, ids_TK[:, some], weights_TK[:, some]) for some in ([0, 1], [0], [1]))
    if not isinstance(together, Tensor) or together.shape != rows_TH.shape:
        found = f"shape {tuple(together.shape)}" if isinstance(together, Tensor) else type(together).__name__
        raise ValueError(f"The experts of {layer} return {found} for hidden states {tuple(rows_TH.shape)}. {_CONTRACT}")
    difference = (together - alone[0] - alone[1]).abs().max()
    largest = torch.stack([out.abs().max() for out in alone]).max()
    if difference > _TOLERANCES.get(dtype, 0.05) * largest:
        raise ValueError(
            f"The experts of {layer} do not add up: two of a token together give up to {difference.item():.2g} more or "
            f"less than one after the other, of values up to {largest.item():.2g}. {_CONTRACT}"
        )
