"""`save_pretrained` of models that are sharded: the whole weights, by every rank's call."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, NoReturn

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.hub.adapter_files import adapter_state
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.export import export_sharded


def save_over_ranks(module: nn.Module) -> None:
    """Has the transformers models and peft adapters in ``module``, which is sharded, save what all ranks hold.

    Their own methods take this rank's shards for the weights. Every rank must call them, as in plain data parallelism.
    """
    for child in module.modules():
        if isinstance(child, PreTrainedModel):
            child.save_pretrained = MethodType(_save_model, child)  # type: ignore[method-assign]
        elif hasattr(child, "save_pretrained") and hasattr(child, "peft_config"):
            child.save_pretrained = MethodType(_save_adapters, child)  # type: ignore[assignment]
        else:
            continue
        child.push_to_hub = MethodType(_refuse_push, child)  # type: ignore[assignment]


def _save_model(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    if push_to_hub:
        _refuse_push(model)
    if adapter.saves_adapters(model) and state_dict is None:
        _save_adapters(model, save_directory, **options)
        return
    if state_dict is not None:  # gathered by the caller, who may be one rank
        type(model).save_pretrained(model, save_directory, is_main_process, state_dict, **options)
        return
    if options:
        rank_zero_warn(f"save_pretrained of a sharded model does not look at {', '.join(options)}.")
    export_sharded(model, Path(save_directory), into_existing=True)


def _save_adapters(model: Any, save_directory: str | Path, **options: Any) -> None:
    if options.get("push_to_hub"):
        _refuse_push(model)
    if options.get("state_dict") is None:
        options["state_dict"] = adapter_state(model, options.get("selected_adapters"))
    options["is_main_process"] = True
    save = partial(type(model).save_pretrained, model, str(save_directory), **options)
    Ranks(CheckpointError).on_first(f"adapters were not saved in {save_directory}", save)


def _refuse_push(model: Any, *_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        f"push_to_hub cannot gather a {type(model).__name__} from its ranks. Call save_pretrained on all ranks (or use "
        "the callback HuggingFaceExport) and then, on one, `huggingface_hub.upload_folder` of that directory."
    )
