"""The command ``lightning-ep export``: a training checkpoint becomes files of the hub, in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters.saved import NamedBase, SavedAdapter, adapter_of_peft, adapter_of_run, is_adapter
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.cli.saved_model import match, origin_of, saved_model
from lightning_ep.data.tokenizers import tokenizer_files
from lightning_ep.distributed.shards import Region
from lightning_ep.hub.adapter_files import AdapterFormat, why_not_written, write_adapters
from lightning_ep.hub.beneath import beneath
from lightning_ep.hub.companions import GENERATION_CONFIG
from lightning_ep.hub.directory import ExportDtype, HubDirectory
from lightning_ep.hub.load import WholeWeights
from lightning_ep.hub.meta_models import meta_model, small_files
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.writer import Group, Part, plan_files, plan_groups, write_files


def export(
    checkpoint: str,
    output: str,
    model: str | None = None,
    dtype: ExportDtype | None = None,
    merge: bool = False,
    format: AdapterFormat = "peft",
    weights_only: bool = True,
) -> None:
    """Writes a training checkpoint as a directory that transformers and vLLM read, or its adapter for PEFT or vLLM.

    The tokenizer, with the chat template that the run's data was written in, and the generation config come along. Runs
    in one process without a GPU, with the parameters of one layer's experts in memory at a time.

    Args:
        checkpoint: A checkpoint of ExpertParallelStrategy, the directory of a distributed one or a file; or the
            directory of an adapter of PEFT.
        output: The new directory. It appears when it is complete.
        model: Directory or hub id of the model that was trained, for what the checkpoint does not hold: code, and the
            tokenizer, generation config or config where the run had none to save. Of an adapter, the model beneath;
            default: what it names.
        dtype: What parameters are in the files. Default: what they are in the checkpoint, and in that of the model
            beneath an adapter.
        merge: Write the whole model with the adapter (LoRA) in its weights: the sum in fp32, rounded once.
        format: Of an adapter alone: peft, or vllm for experts under the names that vLLM reads.
        weights_only: Build no objects from the checkpoint but tensors and plain values: others may run code.

    Raises:
        CheckpointError: If the checkpoint is damaged, does not say what model it is of, or does not fit its config; if
            an adapter cannot be written so, or its base is not there or another one.
        FileExistsError: If ``output`` is there already and not empty.
    """
    directory = HubDirectory(Path(output))
    cast = getattr(torch, dtype) if dtype is not None else None
    given = NamedBase(model) if model is not None else None
    if merge and format != "peft":
        raise ValueError(f"--format {format} is for adapters, and --merge leaves none.")
    if is_adapter(Path(checkpoint)):
        saved = adapter_of_peft(checkpoint, given)
        own = AutoTokenizer.from_pretrained(checkpoint) if tokenizer_files(checkpoint) else None
        assert saved.base is not None
        _export_saved(saved, directory, cast, format, merge, own, small_files(*saved.base))
        print(f"exported to {output}")
        return
    source = SavedWeights(Path(checkpoint), weights_only)
    if not source.bases and (merge or format != "peft"):
        raise ValueError(f"{checkpoint} holds a whole model and no adapter: leave --merge and --format out.")
    of_run = adapter_of_run(source, given) if source.bases else None
    with origin_of(Path(checkpoint), of_run.base if of_run is not None else given, weights_only) as origin:
        if of_run is not None:
            _export_saved(of_run, directory, cast, format, merge, None, origin)
        else:
            prefix, plain = saved_model(source.configs, source.tensors, origin)
            dtypes = match(source.tensors, plain, prefix, checkpoint)
            _write(directory, plain, dtypes, cast, None, origin, lambda name: source.read(prefix + name))
    print(f"exported to {output}")


def _export_saved(
    saved: SavedAdapter,
    directory: HubDirectory,
    cast: torch.dtype | None,
    file_format: AdapterFormat,
    merge: bool,
    tokenizer: Any | None,
    origin: Path | None,
) -> None:
    """Writes an adapter, alone or merged; ``origin`` has the tokenizer, if there is no other, and code."""
    if origin is not None and (origin / GENERATION_CONFIG).exists():
        saved.model.generation_config = GenerationConfig.from_pretrained(origin)
    if merge:
        _export_merged(saved, directory, cast, tokenizer, origin)
    else:
        _export_adapter(saved, directory, cast, file_format, tokenizer, origin)


def _export_adapter(
    saved: SavedAdapter,
    directory: HubDirectory,
    cast: torch.dtype | None,
    file_format: AdapterFormat,
    tokenizer: Any | None,
    origin: Path | None,
) -> None:
    problems = Problems(f"the adapter cannot be written for {file_format}:")
    problems.add("adapters", *why_not_written(saved.model, file_format))
    problems.raise_on_all_ranks()
    state = {}
    for name, tensor in saved.model.state_dict().items():
        found = saved.read(name)
        state[name] = tensor if found is None else found
    directory.create()
    config: Any = next(iter(adapter.peft_configs(saved.model).values()))
    config.base_model_name_or_path, config.revision = saved.base or (None, None)
    write_adapters(saved.model, state, directory, cast, tokenizer, origin, file_format)


def _export_merged(
    saved: SavedAdapter,
    directory: HubDirectory,
    cast: torch.dtype | None,
    tokenizer: Any | None,
    origin: Path | None,
) -> None:
    below = beneath(saved.model)
    base = saved.open_base()
    weights = WholeWeights(base)
    plain = meta_model(saved.model.config, adapter.model_class(saved.model))
    plain.generation_config = saved.model.generation_config
    place = {id(tensor): name for name, tensor in saved.model.state_dict(keep_vars=True).items()}
    names = {name: place[id(tensor)] for name, tensor in below.tensors.items()}
    trained = {name: found for name, key in names.items() if (found := saved.read(key)) is not None}
    dtypes = {**weights.dtypes, **{name: tensor.dtype for name, tensor in trained.items()}}
    problems = Problems(f"{base.name_or_path} and its adapter cannot be merged:")
    problems.add("adapters", *below.problems)
    built, there = plain.state_dict(), base.state_dict()
    for name, tensor in built.items():
        if name in trained or name in adapter.tied_names(plain):
            continue
        if name not in weights.dtypes:
            problems.add("missing", name)
        elif there[name].shape != tensor.shape:
            problems.add("shape", f"{name}: {list(there[name].shape)} in the base, {list(tensor.shape)} in training")
    problems.raise_on_all_ranks()
    if cast is not None:
        dtypes |= dict.fromkeys(below.beside, cast)

    def read(name: str) -> Tensor:
        weight = trained[name] if name in trained else weights.read(name)
        if (beside := below.beside.get(name)) is None:
            return weight
        factors = (saved.read(beside.a), saved.read(beside.b))
        a, b = beside.factors(*(factor for factor in factors if factor is not None))
        return beside.merge(weight, Region.whole(tuple(weight.shape)), a, b, dtypes[name])

    _write(directory, plain, dtypes, cast, tokenizer, origin, read)


def _write(
    directory: HubDirectory,
    plain: PreTrainedModel,
    dtypes: Mapping[str, torch.dtype],
    cast: torch.dtype | None,
    tokenizer: Any | None,
    origin: Path | None,
    read: Callable[[str], Tensor],
) -> None:
    """Writes a model whose tensors ``read`` gives by name, one after the other."""
    groups = plan_groups(plain, dtypes, cast)
    files = plan_files(groups, {spec.key: 0 for group in groups for spec in group.outputs}, 1)

    def assemble(group: Group) -> dict[str, Tensor]:
        loaded = {key: read(key) for key in group.conversion.inputs}
        return {part.key: _assemble(part, loaded) for part in group.parts}

    directory.create()
    first_param = next(name for name, _ in plain.named_parameters())
    directory.write_config(plain, cast or dtypes[first_param], tokenizer, origin)
    problems = Problems(f"the export to {directory.path} failed:")
    write_files(directory.temporary, plain, groups, files, assemble, 0, problems)
    if not problems.found:
        directory.finish(files, problems)
    problems.raise_on_all_ranks()


def _assemble(part: Part, tensors: Mapping[str, Tensor]) -> Tensor:
    boxes = [piece.arrange(piece.source_region().of(tensors[piece.key])) for piece in part.pieces]
    if len(boxes) == 1:
        return boxes[0]  # a view: an expert is not copied before it is written
    tensor = torch.empty(part.shape, dtype=part.dtype)
    for piece, box in zip(part.pieces, boxes, strict=True):
        piece.target.of(tensor).copy_(box)
    return tensor
