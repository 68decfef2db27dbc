"""Which tokens of a row may see each other beyond causality, found out on the host, where kernels need to know it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_ep.transformers_adapter import Packing, bounds_of, learns_padding


@dataclass(frozen=True)
class Documents:
    """Runs of tokens that attend causally among themselves and to nothing else.

    Attributes:
        bounds: int32 ``[N + 1]``, where the N runs begin in the rows put one after the other, and their end; None where
            every row is one run (as far as tokens that count are concerned), or if ``gaps``.
        longest: Tokens of the longest run, 0 without ``bounds``.
        gaps: Whether the tokens that count are no contiguous run in some row, or labels count at padding: only a mask
            can describe them.
        by_positions: Whether positions describe them, and a mask, if there is one, adds nothing.
    """

    bounds: Tensor | None = None
    longest: int = 0
    gaps: bool = False
    by_positions: bool = False

    @property
    def plain(self) -> bool:
        """Whether causal attention over whole rows is right."""
        return self.bounds is None and not self.gaps


def find_documents(
    position_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None = None
) -> Documents:
    """Reads packing and padding; with a mask, positions count only if they restart between tokens that count.

    The host reads the values: of tensors on a GPU it waits for them.

    Args:
        position_ids: Integers ``[B, S]``; a document begins wherever they do not go on by one.
        attention_mask: ``[B, S]``, zero where a token is padding.
        labels: ``[B, S]``, -100 where none counts.

    Raises:
        ValueError: If documents are packed beside padding that is not on the right.
    """
    packing = Packing.of(position_ids, attention_mask)
    packing.refuse_gaps()
    if packing.packed:
        return Documents(packing.bounds, packing.longest, by_positions=True)
    if attention_mask is None:
        return Documents()
    valid_BS = attention_mask.cpu().bool()
    edges_BS = valid_BS[:, 1:] != valid_BS[:, :-1]
    runs_B = valid_BS[:, 0].int() + (edges_BS & valid_BS[:, 1:]).sum(1)
    if (runs_B > 1).any() or learns_padding(valid_BS, labels):
        return Documents(gaps=True)
    if (valid_BS[:, 0] | (runs_B == 0)).all():
        return Documents()  # padding on the right: no token that counts sees it
    bounds = bounds_of(edges_BS)
    return Documents(bounds, int(bounds.diff().max()))
