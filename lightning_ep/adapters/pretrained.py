"""Adapters of PEFT on the disk or the hub, to go on from: what they say, and their values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lightning_ep.distributed.agreement import Ranks
from lightning_ep.hub.adapter_files import PREFIX
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.initialize import assign
from lightning_ep.hub.meta_models import download

if TYPE_CHECKING:
    import peft

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_LEAVE_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # starts that do not change the weights beneath


def find_adapter(path: str) -> Path:
    """The directory of an adapter, downloaded if ``path`` is the id of one on the hub. Every rank must call it.

    Raises:
        CheckpointError: On every rank, if there is none, or none with safetensors.
    """
    if not dist.is_initialized():
        return _find(path)
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0  # of every node one rank first, which may download
    return Ranks(CheckpointError).in_turns(f"the adapter {path} cannot be opened", first, lambda: _find(path))


def _find(path: str) -> Path:
    directory = Path(path).expanduser()
    if not directory.is_dir():
        directory = download(path, None, [_CONFIG, _WEIGHTS])
    missing = [name for name in (_CONFIG, _WEIGHTS) if not (directory / name).exists()]
    if missing:
        raise CheckpointError(
            f"{directory} is no adapter of PEFT in safetensors: it has no {' and no '.join(missing)}."
        )
    return directory


def read_config(directory: Path) -> peft.LoraConfig:
    """What an adapter adapts, and how, to be trained.

    Raises:
        CheckpointError: If it is another method than LoRA, or a variant that cannot be gone on with.
    """
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(directory))
    if type(config) is not LoraConfig:
        raise CheckpointError(f"{directory} is an adapter of the method {config.peft_type}, and not of LoRA.")
    if config.init_lora_weights not in _LEAVE_THE_BASE:
        raise CheckpointError(
            f"{directory} was begun with init_lora_weights={config.init_lora_weights!r}, which changes the weights "
            "beneath. Convert it to plain LoRA first, as PEFT describes "
            "(`save_pretrained(..., path_initial_model_for_weight_conversion=...)`)."
        )
    config.inference_mode = False
    config.init_lora_weights = True
    return config


@torch.no_grad()
def fill_adapter(model: PreTrainedModel, directory: Path) -> None:
    """Gives the adapter of a model its values, in memory on the CPU.

    Args:
        model: A model with PEFT's modules as `read_config` says, not sharded.
        directory: As `find_adapter` returned it.

    Raises:
        CheckpointError: If names or shapes differ.
    """
    from peft import set_peft_model_state_dict

    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assign(model, {id(p): torch.full(p.shape, torch.nan, dtype=p.dtype) for p in trained.values() if p.is_meta})
    trained = {name: model.get_parameter(name) for name in trained}
    try:
        # Of modules that an adapter has whole, PEFT looks for the names without what is in front of all in a file.
        state = {name.removeprefix(PREFIX): value for name, value in load_file(directory / _WEIGHTS).items()}
        loaded: Any = set_peft_model_state_dict(model, state)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the adapter in {directory} does not fit {type(model).__name__}: {error}") from error
    unexpected = loaded.unexpected_keys
    missing = [name for name, param in trained.items() if param.isnan().any()]
    if missing or unexpected:
        raise CheckpointError(
            f"the adapter in {directory} does not fit {type(model).__name__}. Missing: {missing[:4] or 'none'}; "
            f"without a place: {unexpected[:4] or 'none'}."
        )
