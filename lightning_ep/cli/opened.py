"""A trained model for use: of a directory or hub id, or of a checkpoint of a run; over all processes of torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoTokenizer, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.checkpoint.resume import Resume
from lightning_ep.cli.saved_model import match, origin_of, saved_model
from lightning_ep.data.tokenizers import check_vocabulary, tokenizer_files
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.fsdp.groups import in_bf16
from lightning_ep.hub.directory import ExportDtype
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.hub.meta_models import cast_parameters, from_pretrained, small_files
from lightning_ep.layout import ParallelLayout
from lightning_ep.moe.expert_parallel import expert_plan
from lightning_ep.parallelize import shard

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Opened:
    """A model that is ready for forwards, which every rank must enter.

    Attributes:
        model: In eval mode; sharded if there are several ranks.
        tokenizer: The model's.
        layout: Which rank holds what, and which ranks see one batch (those of ``tp``).
        rank: This rank.
        device: Its device.
    """

    model: PreTrainedModel
    tokenizer: Any
    layout: ParallelLayout
    rank: int
    device: torch.device


@contextmanager
def opened(
    checkpoint: str,
    model: str | None = None,
    dtype: ExportDtype | None = None,
    ep: int | Literal["auto"] = "auto",
    tp: int = 1,
    weights_only: bool = True,
) -> Iterator[Opened]:
    """Opens a model on the processes that torchrun has started, or on this one alone, until the block ends.

    Commands hand their options on to it, so that the sentences here are those of their help.

    Args:
        checkpoint: A training checkpoint, a directory in the hub's layout (an export), or the id of a model on the hub.
        model: Directory or hub id of the model that was trained, for what a training checkpoint does not hold: its
            tokenizer if the data module had none.
        dtype: What weights are held and multiplied in. Default: what they are in the checkpoint.
        ep: Processes that share one set of experts.
        tp: Processes that share the matrices of attention.
        weights_only: Build no objects from a training checkpoint but tensors and plain values: others may run code.

    Raises:
        CheckpointError: On every rank, if there is no such checkpoint, it is damaged, or it has no tokenizer.
        ValueError: If the layout does not fit the model or the processes, or the tokenizer does not fit the model.
    """
    with process_group() as device:
        world = dist.get_world_size()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        layout = ParallelLayout.resolve(ep, "auto", world, local, tp=tp)
        ranks = Ranks(CheckpointError, _TIMEOUT)
        what = f"{checkpoint} cannot be opened"
        of_run = ranks.on_first(what, lambda: _is_of_run(Path(checkpoint).expanduser()))
        cast = getattr(torch, dtype) if dtype is not None else None
        with ExitStack() as files:
            origin = ranks.alone(what, lambda: _origin(files, checkpoint, model, of_run, weights_only))
            tokenizer = ranks.alone(what, lambda: _tokenizer(origin, model or checkpoint, of_run))
            if of_run:
                found = _of_run(Path(checkpoint).expanduser(), origin, layout, device, ranks, cast, weights_only)
            else:
                overrides: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
                found = from_pretrained(checkpoint, **overrides)
                _shard(found, layout, device)
                stream_pretrained(found, device)
                materialize(found, device, seed=0)  # buffers that are in no file
        check_vocabulary(tokenizer, found.config, "Give the tokenizer of the model with --model.")
        yield Opened(found.eval(), tokenizer, layout, dist.get_rank(), device)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """This process's device, with the process group of torchrun or one of this process alone."""
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ValueError(f"there are {gpus} GPUs, and torchrun has started more processes on this node: start {gpus}.")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    backend = "nccl" if gpus else "gloo"
    if gpus:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _is_of_run(path: Path) -> bool:
    """Whether a path is a checkpoint of a run, and not a directory in the hub's layout or the id of a model.

    Raises:
        CheckpointError: If it can be none of them.
    """
    if (path / "config.json").exists():
        return False
    if path.exists():
        return True
    if path.suffix == ".ckpt" or len(path.parts) > 2 or path.parts[:1] in ((".",), ("/",)):
        raise CheckpointError("there is neither a checkpoint nor a directory of a model.")
    return False


def _origin(files: ExitStack, checkpoint: str, model: str | None, of_run: bool, weights_only: bool) -> Path | None:
    """Where the tokenizer is, and what else belongs to the model; what is made for it goes with ``files``."""
    if of_run:
        return files.enter_context(origin_of(Path(checkpoint).expanduser(), model, weights_only))
    return small_files(model or checkpoint)


def _tokenizer(origin: Path | None, name: str, of_run: bool) -> Any:
    if origin is not None and tokenizer_files(str(origin)):
        return AutoTokenizer.from_pretrained(origin)
    if of_run:
        raise CheckpointError(
            "the run had no tokenizer to save in it: name the directory or hub id of the model that was trained with "
            "--model, or export the checkpoint and open what was exported."
        )
    raise CheckpointError(f"{name} has no tokenizer: name a directory or hub id that has it with --model.")


def _of_run(
    path: Path,
    origin: Path | None,
    layout: ParallelLayout,
    device: torch.device,
    ranks: Ranks,
    cast: torch.dtype | None,
    weights_only: bool,
) -> PreTrainedModel:
    """The model in a checkpoint of a run, whatever layout wrote it."""
    saved = Resume(path, ranks, weights_only)
    tensors = saved.weights()
    prefix, model = ranks.alone(f"{path} cannot be opened", lambda: saved_model(saved.configs, tensors, origin))
    dtypes = match(tensors, model, prefix, str(path))
    if cast is not None:
        cast_parameters(model, cast)
    else:
        for name, param in model.named_parameters():
            param.data = param.data.to(dtypes.get(name, param.dtype))
    module = _under_its_name(model, prefix)
    _shard(module, layout, device)
    saved.allocate(module, device)
    saved.restore(module)
    materialize(module, device, seed=0)  # buffers that are not saved
    return model


def _shard(module: nn.Module, layout: ParallelLayout, device: torch.device) -> None:
    """Shards what is on meta over several processes; alone, forwards need not gather what is whole."""
    policy = MixedPrecisionPolicy()
    if layout.world_size > 1:
        shard(module, layout, layout.build_meshes(device.type), device, expert_plan(module), policy)
        return
    for model in adapter.pretrained_models(module).values():
        if in_bf16(model, policy):
            adapter.cast_constants(model)


def _under_its_name(model: PreTrainedModel, prefix: str) -> LightningModule:
    """A module in which the model's tensors have the names that they have in the checkpoint."""
    if not prefix:
        raise CheckpointError("the checkpoint holds no LightningModule but the model itself: `lightning-ep export` it.")
    module = LightningModule()
    module.strict_loading = False  # what else the run trained is left there
    *parents, last = prefix.removesuffix(".").split(".")
    owner: nn.Module = module
    for name in parents:
        owner.add_module(name, nn.Module())
        owner = owner.get_submodule(name)
    owner.add_module(last, model)
    return module
