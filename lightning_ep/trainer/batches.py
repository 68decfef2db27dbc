"""A batch on its way to the device: what it says of its documents is read while the host still has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import Documents, documents_of
from lightning_ep.trainer.cost_warnings import say_if_documents_need_a_mask


class Batches:
    """Moves batches, and remembers what was read of them.

    Attributes:
        documents: Under ``cp``, who may see whom in the batches that were moved.
        shape: Sequences and tokens of the last one that was moved, where it has ``input_ids``.
    """

    def __init__(self) -> None:
        self.documents: adapter.ReadOnHost[Documents] = adapter.ReadOnHost()
        self.shape: tuple[int, int] | None = None
        self._had_documents = False

    def to_device(
        self, batch: Any, module: LightningModule, device: torch.device, loader_index: int, num_context_ranks: int
    ) -> Any:
        """The batch on a device, by the two hooks of the module, as Lightning moves it.

        Args:
            batch: What a loader gave.
            module: The module, whose hooks are called.
            device: Where it goes.
            loader_index: Of the loader, for the hooks.
            num_context_ranks: The size of ``cp``.
        """
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        self.shape = (ids.shape[0], ids.shape[1]) if isinstance(ids, Tensor) and ids.dim() == 2 else None
        packing = adapter.packing_of(batch)
        documents = documents_of(batch, num_context_ranks) if num_context_ranks > 1 else None
        if packing is not None and packing.packed and num_context_ranks == 1 and not self._had_documents:
            self._had_documents = True
            say_if_documents_need_a_mask(module, device)
        moved = module._call_batch_hook("transfer_batch_to_device", batch, device, loader_index)
        # Not of a transfer of the user's own, which may make something else of it. A hook after the transfer may, too,
        # but then the tensors are other ones.
        if not is_overridden("transfer_batch_to_device", module):
            if packing is not None:
                adapter.note_packing(moved, packing)
            if documents is not None:
                self.documents.note(moved, documents)
        return module._call_batch_hook("on_after_batch_transfer", moved, loader_index)
