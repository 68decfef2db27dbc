"""The command ``lightning-ep export``: a training checkpoint becomes a Hugging Face checkpoint, in one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.cli.saved_model import match, origin_of, saved_model
from lightning_ep.hub.directory import ExportDtype, HubDirectory
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.writer import Group, Part, plan_files, plan_groups, write_files


def export(
    checkpoint: str,
    output: str,
    model: str | None = None,
    dtype: ExportDtype | None = None,
    weights_only: bool = True,
) -> None:
    """Writes a training checkpoint as a directory that transformers and vLLM read.

    The tokenizer, with the chat template that the run's data was written in, and the generation config come along. Runs
    in one process without a GPU, with the parameters of one layer's experts in memory at a time.

    Args:
        checkpoint: A checkpoint of ExpertParallelStrategy: the directory of a distributed one, or a file.
        output: The new directory. It appears when it is complete.
        model: Directory or hub id of the model that was trained, for what the checkpoint does not hold: code, and the
            tokenizer, generation config or config where the run had none to save.
        dtype: What parameters are in the files. Default: what they are in the checkpoint.
        weights_only: Build no objects from the checkpoint but tensors and plain values: others may run code.

    Raises:
        CheckpointError: If the checkpoint is damaged, does not say what model it is of, or does not fit its config.
        FileExistsError: If ``output`` is there already and not empty.
    """
    directory = HubDirectory(Path(output))
    source = SavedWeights(Path(checkpoint), weights_only)
    with origin_of(Path(checkpoint), model, weights_only) as origin:
        prefix, plain = saved_model(source.configs, source.tensors, origin)
        dtypes = match(source.tensors, plain, prefix, checkpoint)
        cast = getattr(torch, dtype) if dtype is not None else None
        groups = plan_groups(plain, dtypes, cast)
        files = plan_files(groups, {spec.key: 0 for group in groups for spec in group.outputs}, 1)
        directory.create()
        first_param = next(name for name, _ in plain.named_parameters())
        directory.write_config(plain, cast or dtypes[first_param], None, origin)

    def assemble(group: Group) -> dict[str, Tensor]:
        loaded = {key: source.read(prefix + key) for key in group.conversion.inputs}
        return {part.key: _assemble(part, loaded) for part in group.parts}

    problems = Problems(f"the export to {output} failed:")
    write_files(directory.temporary, plain, groups, files, assemble, 0, problems)
    if not problems.found:
        directory.finish(files, problems)
    problems.raise_on_all_ranks()
    print(f"exported to {output}")


def _assemble(part: Part, tensors: Mapping[str, Tensor]) -> Tensor:
    boxes = [piece.arrange(piece.source_region().of(tensors[piece.key])) for piece in part.pieces]
    if len(boxes) == 1:
        return boxes[0]  # a view: an expert is not copied before it is written
    tensor = torch.empty(part.shape, dtype=part.dtype)
    for piece, box in zip(part.pieces, boxes, strict=True):
        piece.target.of(tensor).copy_(box)
    return tensor
