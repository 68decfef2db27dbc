"""Exports a model that is sharded over the ranks of this job."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.beneath import is_adapted
from lightning_ep.hub.directory import HubDirectory, check_place, check_same_path
from lightning_ep.hub.meta_models import meta_model
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.source import source_directory
from lightning_ep.hub.writer import Group, OutputFile, ShardedTensors, plan_files, plan_groups, write_files

_SAVE_BY_HAND = (
    "Adapters of peft alone are written by the callback HuggingFaceExport and by `save_pretrained` of the model, which "
    "all ranks call; with `merge=True` the callback writes the whole model with LoRA in its weights. For others save a "
    "checkpoint (`trainer.save_checkpoint`), make one file of it with `lightning-ep consolidate`, and in one process "
    "`load_state_dict` its 'state_dict' into the LightningModule with the model built in memory, by plain "
    "transformers. That model's own `save_pretrained` writes it."
)


def export_sharded(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Any | None = None,
    into_existing: bool = False,
    merge: bool = False,
) -> None:
    """Writes a Hugging Face checkpoint; every rank must call it, and writes its own files.

    Args:
        model: A transformers model, sharded or not.
        path: The new directory, the same on every rank and on a filesystem that they share.
        dtype: What parameters are in the files; by default what they are.
        tokenizer: Anything with ``save_pretrained``. Default: tokenizer files of the checkpoint the model came from.
        into_existing: As in `HubDirectory`.
        merge: Write the model beneath the adapters of LoRA with their products in its weights, in fp32, rounded once.

    Raises:
        CheckpointError: On every rank, if the model cannot be exported or a rank could not write. Nothing is at
            ``path`` then.
    """
    problems = Problems(f"the export to {path} failed:")
    plan = _plan(model, path, dtype, merge, problems)
    directory = _begin(plan, model, path, dtype, tokenizer, into_existing, problems)
    temporary = HubDirectory.temporary_of(path)
    sharded, owners = plan.sharded, plan.owners
    write_files(
        temporary, plan.plain, plan.groups, plan.files, lambda g: sharded.assemble(g, owners), sharded.rank, problems
    )
    problems.raise_on_all_ranks()
    if directory is not None:
        try:
            directory.finish(plan.files, problems)
        except OSError as error:
            problems.add("on rank 0", str(error))
    problems.raise_on_all_ranks()


def check_export(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Any | None = None,
    merge: bool = False,
) -> None:
    """Does all that `export_sharded` does but write weights, and leaves nothing behind. Every rank must call it.

    Args:
        model: As in `export_sharded`, like the others.
        path: The directory.
        dtype: What parameters would be.
        tokenizer: The tokenizer.
        merge: Whether adapters would be merged.

    Raises:
        CheckpointError: On every rank, with all that `export_sharded` would fail for.
    """
    problems = Problems(f"{path} could not be written at the end of the run:")
    plan = _plan(model, path, dtype, merge, problems)
    directory = _begin(plan, model, path, dtype, tokenizer, False, problems)
    check_place(path, sum(s.nbytes for f in plan.files for s in f.specs), directory is not None, problems)


@dataclass(frozen=True)
class _Plan:
    plain: PreTrainedModel
    sharded: ShardedTensors
    groups: list[Group]
    owners: dict[str, int]
    files: list[OutputFile]


def _plan(model: PreTrainedModel, path: Path, dtype: torch.dtype | None, merge: bool, problems: Problems) -> _Plan:
    """What would be written by whom; raises on every rank if the model is none that its config describes."""
    check_same_path(path, problems)
    sharded = ShardedTensors(model, merge, dtype)
    problems.add("merge", *sharded.problems)
    if merge and not is_adapted(model):
        problems.add("merge", f"{type(model).__name__} has no adapters: leave `merge` out.")
    problems.raise_on_all_ranks()
    plain = meta_model(model.config, adapter.model_class(model))
    if hasattr(model, "generation_config"):  # heads that generate nothing have none
        plain.generation_config = model.generation_config
    _compare(sharded, plain, problems)
    problems.raise_on_all_ranks()
    groups: list[Group] = []
    try:
        groups = plan_groups(plain, sharded.dtypes, dtype)
    except (ValueError, RuntimeError, LookupError, AttributeError) as error:  # whatever operations object to
        problems.add("conversion", f"to the hub's layout: {type(error).__name__}: {error}")
    problems.raise_on_all_ranks()
    owners = sharded.choose_owners(groups)
    return _Plan(plain, sharded, groups, owners, plan_files(groups, owners, sharded.num_ranks))


def _compare(sharded: ShardedTensors, plain: PreTrainedModel, problems: Problems) -> None:
    """Notes where a model is not what its class builds from its config: nobody could load what would be written."""
    built, found = plain.state_dict(keep_vars=True), sharded.tensors
    name = type(plain).__name__
    for kind, one, other in (("unknown", found, built), ("missing", built, found)):
        problems.add(kind, *[key for key in one if key not in other and not adapter.not_saved(plain, key)])
    if added := adapter.selection_biases(plain, found):
        problems.add(
            "rule",
            f"BiasUpdates balances routers of a {name} by biases ({next(iter(added))} and more) for which the hub's "
            "layout has no place. Save checkpoints: `lightning-ep export --drop_router_bias` writes one without them. "
            "Or balance by BalancingLoss.",
        )
    elif problems.found:
        problems.add(
            "rule",
            f"what is written is a {name} as its config describes it, and that one has other names: adapters and "
            f"replaced modules change them. {_SAVE_BY_HAND}",
        )
    if problems.found:
        return
    shapes = [
        f"{key}: {list(tensor.shape)}, the config makes it {list(built[key].shape)}; change model.config with the model"
        for key, tensor in found.items()
        if tensor.shape != built[key].shape
    ]
    problems.add("shape", *shapes)
    untied = [
        f"{copy} and {key} are two, and the config says one: set model.config.tie_word_embeddings = False"
        for copy, key in adapter.tied_names(plain).items()
        if copy in found and found[copy] is not found.get(key)
    ]
    problems.add("tied", *untied)


def _begin(
    plan: _Plan,
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype | None,
    tokenizer: Any | None,
    into_existing: bool,
    problems: Problems,
) -> HubDirectory | None:
    """Makes the temporary directory with all but the weights, on rank 0; every rank must call it."""
    directory: HubDirectory | None = None
    if plan.sharded.rank == 0:
        try:
            directory = HubDirectory(path, into_existing)
            directory.create()
            directory.write_config(plan.plain, dtype or model.dtype, tokenizer, source_directory(model))
        except (OSError, ValueError, TypeError) as error:
            problems.add("on rank 0", str(error))
    problems.raise_on_all_ranks()
    return directory
