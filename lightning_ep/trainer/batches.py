"""A batch on its way to the device: what it says of its documents is read while the host still has it.

Also what is wrong with one: ids that the model does not have, and ranks that share batches but not these.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import Documents, documents_of
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.layout import ParallelLayout
from lightning_ep.trainer.cost_warnings import say_if_documents_need_a_mask


@runtime_checkable
class RefusesBatches(Protocol):
    """A module that looks at its batches before they go to the device.

    Not by Lightning's hook for that: where a module has one, that of the user's data module is not called.
    """

    def refuse_batch(self, batch: Any) -> None:
        """Raises if the batch cannot be trained on."""


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
        if isinstance(module, RefusesBatches):
            module.refuse_batch(batch)
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


def refuse_unknown_ids(batch: Any, embedding: nn.Module) -> None:
    """Raises ValueError for ids that the input embedding has no row for, if the batch is still on the host.

    On a GPU they would end the process with an assertion of a kernel that names nothing.

    Args:
        batch: With ``input_ids``, integers of any shape, if it is a mapping.
        embedding: The input embedding, or what PEFT has put around it.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    vocabulary = next((m.num_embeddings for m in embedding.modules() if isinstance(m, nn.Embedding)), None)
    if vocabulary is None or not isinstance(ids, Tensor) or ids.is_cuda or ids.numel() == 0:
        return
    least, largest = (int(value) for value in ids.aminmax())
    if least < 0 or largest >= vocabulary:
        wrong = least if least < 0 else largest
        where = [int(index) for index in (ids == wrong).nonzero()[0]]
        raise ValueError(
            f"input_ids of the batch hold {wrong} (at {where}), and the model has ids from 0 to {vocabulary - 1}. The "
            "tokenizer is that of another model, or has tokens that the model lacks: "
            "`model.resize_token_embeddings(len(tokenizer))` in `configure_model` adds them. Padding needs an id, too, "
            "and is marked by labels of -100."
        )


def check_shared_batches(batch: Any, layout: ParallelLayout) -> None:
    """Compares a batch among ranks that share theirs (``tp``, ``cp``); every rank must call it, in its first step.

    Args:
        batch: Mappings and sequences of tensors, on any device: the host waits for it.
        layout: The layout.

    Raises:
        ValueError: On every rank, if some are given different ones; names ranks, tensors and what to do.
    """
    share = layout.tp * layout.cp
    if share == 1:
        return
    found = from_all_ranks(dict(_checksums("batch", batch)))
    for first in range(0, len(found), share):
        differing = {name for peer in found[first : first + share] for name, _ in found[first].items() ^ peer.items()}
        if differing:
            raise ValueError(
                f"ranks {first} to {first + share - 1} share one batch (tp={layout.tp}, cp={layout.cp}), and were "
                f"given different ones in the first step: {', '.join(sorted(differing))} differ. Split data over "
                "`strategy.data_world_size` by `strategy.data_rank`, not over ranks (a sampler that Lightning puts in "
                "does), and let what is random in a dataset depend on the sample and not on the rank."
            )


def _checksums(name: str, value: Any) -> Iterator[tuple[str, int]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _checksums(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _checksums(f"{name}[{index}]", item)
    elif isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous()
        in_bytes = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, zlib.crc32(in_bytes, zlib.crc32(repr(numbers.shape).encode()))
