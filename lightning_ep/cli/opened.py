"""A trained model for use, over all processes of torchrun: of a hub directory, a run, or an adapter and its base."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters import LoRA, add_adapter
from lightning_ep.adapters.saved import NamedBase, base_of_peft, base_of_run, is_adapter, open_base, put_in_again
from lightning_ep.checkpoint.resume import Resume
from lightning_ep.checkpoint.saved_weights import named_bases
from lightning_ep.cli.saved_model import match, origin_of, saved_model
from lightning_ep.data.tokenizers import check_vocabulary, tokenizer_files
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.fsdp.groups import in_bf16
from lightning_ep.hub.beneath import is_adapted
from lightning_ep.hub.companions import GENERATION_CONFIG
from lightning_ep.hub.directory import ExportDtype
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import note_bases
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
        checkpoint: A training checkpoint, a directory in the hub's layout (an export) or with an adapter of PEFT, or
            the id of a model on the hub.
        model: Directory or hub id of the model that was trained, for what a training checkpoint does not hold: its
            tokenizer if the data module had none. Of an adapter, the model beneath, if it is not where that says.
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
        path = Path(checkpoint).expanduser()
        kind = ranks.on_first(what, lambda: _kind(path))
        given = NamedBase(model) if model is not None else None
        base = given or ranks.alone(what, lambda: _named_base(path, kind))
        cast = getattr(torch, dtype) if dtype is not None else None
        with ExitStack() as files:
            origin = ranks.alone(what, lambda: _origin(files, checkpoint, base, kind, weights_only))
            tokenizer = ranks.alone(what, lambda: _tokenizer(origin, base.model if base else checkpoint, kind))
            if kind == "run":
                found = _of_run(path, given, origin, layout, device, ranks, cast, weights_only)
            else:
                overrides: dict[str, Any] = {"dtype": dtype} if dtype is not None else {}
                weights = NamedBase(checkpoint) if kind == "model" or base is None else base
                found = from_pretrained(weights.model, revision=weights.revision, **overrides)
                if kind == "adapter":
                    _adapt(found, lambda: add_adapter(found, LoRA(pretrained=str(path))))
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


def _kind(path: Path) -> Literal["model", "adapter", "run"]:
    """Whether a path is a directory in the hub's layout or the id of a model, an adapter of PEFT, or of a run.

    Raises:
        CheckpointError: If it can be none of them.
    """
    if (path / "config.json").exists():
        return "model"
    if is_adapter(path):
        return "adapter"
    if path.exists():
        return "run"
    if path.suffix == ".ckpt" or len(path.parts) > 2 or path.parts[:1] in ((".",), ("/",)):
        raise CheckpointError("there is neither a checkpoint nor a directory of a model.")
    return "model"


def _named_base(path: Path, kind: str) -> NamedBase | None:
    """The model that an adapter says it is of."""
    if kind == "adapter":
        return base_of_peft(path)
    bases = named_bases(path) if kind == "run" else {}
    return next(map(base_of_run, bases.values()), None)


def _origin(files: ExitStack, checkpoint: str, base: NamedBase | None, kind: str, weights_only: bool) -> Path | None:
    """Where the tokenizer is, and what else belongs to the model; what is made for it goes with ``files``."""
    if kind == "run":
        return files.enter_context(origin_of(Path(checkpoint).expanduser(), base, weights_only))
    # An adapter may have been trained with a template of its own.
    own = kind == "adapter" and tokenizer_files(checkpoint)
    return small_files(checkpoint) if own or base is None else small_files(*base)


def _tokenizer(origin: Path | None, name: str, kind: str) -> Any:
    if origin is not None and tokenizer_files(str(origin)):
        return AutoTokenizer.from_pretrained(origin)
    if kind == "run":
        raise CheckpointError(
            "the run had no tokenizer to save in it: name the directory or hub id of the model that was trained with "
            "--model, or export the checkpoint and open what was exported."
        )
    raise CheckpointError(f"{name} has no tokenizer: name a directory or hub id that has it with --model.")


def _of_run(
    path: Path,
    base: NamedBase | None,
    origin: Path | None,
    layout: ParallelLayout,
    device: torch.device,
    ranks: Ranks,
    cast: torch.dtype | None,
    weights_only: bool,
) -> PreTrainedModel:
    """The model in a checkpoint of a run, whatever layout wrote it."""
    saved = Resume(path, ranks, weights_only)
    if saved.bases:
        prefix, model = _of_adapters(saved, base, cast)
        if origin is not None and (origin / GENERATION_CONFIG).exists():
            model.generation_config = GenerationConfig.from_pretrained(origin)
    else:
        prefix, model = _of_whole(saved, origin, ranks, cast)
    module = _under_its_name(model, prefix)
    _shard(module, layout, device)
    note_bases(module)
    saved.allocate(module, device)
    stream_pretrained(module, device)
    # A base that was drawn, and buffers that are not saved.
    seeds = [base["seed"] for base in saved.bases.values() if base["seed"] is not None]
    materialize(module, device, seed=seeds[0] if seeds else 0)
    saved.restore(module)
    return model


def _of_whole(
    saved: Resume, origin: Path | None, ranks: Ranks, cast: torch.dtype | None
) -> tuple[str, PreTrainedModel]:
    """What is in front of the model's names in a checkpoint that holds all of it, and the model on meta."""
    tensors = saved.weights()
    prefix, model = ranks.alone(f"{saved.path} cannot be opened", lambda: saved_model(saved.configs, tensors, origin))
    dtypes = match(tensors, model, prefix, str(saved.path))
    if cast is not None:
        cast_parameters(model, cast)
    else:
        for name, param in model.named_parameters():
            param.data = param.data.to(dtypes.get(name, param.dtype))
    return prefix, model


def _of_adapters(saved: Resume, base: NamedBase | None, cast: torch.dtype | None) -> tuple[str, PreTrainedModel]:
    """What is in front of the model's names in a checkpoint that holds adapters only, and the model on meta."""
    if len(saved.bases) != 1:
        raise CheckpointError(f"{saved.path} has adapters of {len(saved.bases)} models; one is needed.")
    ((name, described),) = saved.bases.items()
    model = open_base(described, saved.configs[name], base)
    _adapt(model, lambda: put_in_again(model, described["adapters"]), cast)
    return f"{name}." if name else "", model


def _adapt(model: PreTrainedModel, put_in: Callable[[], object], cast: torch.dtype | None = None) -> None:
    """Adapts a model; the adapter is held in the dtype of the weights beside it, in which training multiplies, too."""
    dtype = cast or next(model.parameters()).dtype
    put_in()
    cast_parameters(model, dtype)


def _shard(module: nn.Module, layout: ParallelLayout, device: torch.device) -> None:
    """Shards what is on meta over several processes; alone, forwards need not gather what is whole."""
    policy = MixedPrecisionPolicy()
    models = adapter.pretrained_models(module).values()
    if layout.world_size > 1 or any(map(is_adapted, models)):  # factors of experts are held as when they are sharded
        shard(module, layout, layout.build_meshes(device.type), device, expert_plan(module), policy)
        return
    for model in models:
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
