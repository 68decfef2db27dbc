"""Exports a model that is sharded over the ranks of this job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.directory import HubDirectory
from lightning_ep.hub.meta_models import meta_model
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.source import source_directory
from lightning_ep.hub.writer import ShardedTensors, plan_files, plan_groups, write_files


def export_sharded(
    model: PreTrainedModel, path: Path, dtype: torch.dtype | None = None, tokenizer: Any | None = None
) -> None:
    """Writes a Hugging Face checkpoint; every rank must call it, and writes its own files.

    Args:
        model: A transformers model, sharded or not.
        path: The new directory, the same on every rank and on a filesystem that they share.
        dtype: What parameters are in the files; by default what they are.
        tokenizer: Anything with ``save_pretrained``. Default: tokenizer files of the checkpoint the model came from.

    Raises:
        CheckpointError: On every rank, if one could not write. Nothing is at ``path`` then.
    """
    problems = Problems(f"the export to {path} failed:")
    sharded = ShardedTensors(model)
    plain = meta_model(model.config, adapter.model_class(model))
    plain.generation_config = model.generation_config
    groups = plan_groups(plain, sharded.dtypes, dtype)
    owners = sharded.choose_owners(groups)
    files = plan_files(groups, owners, sharded.num_ranks)
    first = sharded.rank == 0
    directory: HubDirectory | None = None
    if first:
        try:
            directory = HubDirectory(path)
            directory.create()
            directory.write_config(plain, dtype or model.dtype, tokenizer, source_directory(model))
        except (OSError, ValueError) as error:
            problems.add("on rank 0", str(error))
    problems.raise_on_all_ranks()
    temporary = HubDirectory.temporary_of(path)
    write_files(temporary, plain, groups, files, lambda g: sharded.assemble(g, owners), sharded.rank, problems)
    problems.raise_on_all_ranks()
    if directory is not None:
        try:
            directory.finish(files, problems)
        except OSError as error:
            problems.add("on rank 0", str(error))
    problems.raise_on_all_ranks()
