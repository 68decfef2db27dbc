"""Adapters that are saved, in a checkpoint of a run or by PEFT, and the base that they say they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters.factors import hold_per_expert
from lightning_ep.adapters.lora import LoRA, add_adapter, put_in
from lightning_ep.adapters.pretrained import find_adapter, read_config
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import fingerprint
from lightning_ep.hub.meta_models import config_of, from_config, from_pretrained, meta_model
from lightning_ep.hub.source import source_directory


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in files.

    Attributes:
        model: The model that has it, whose base is on meta.
        base: Hub id or path of the base; None if that was drawn.
        revision: That on the hub.
        read: Gives what is saved of the model's tensors by name, whole and on the CPU; None of others.
        fingerprint: Of the base's tensors, where it is known.
    """

    model: PreTrainedModel
    base: str | None
    revision: str | None
    read: Callable[[str], Tensor | None]
    fingerprint: str | None = None

    def open_base(self) -> PreTrainedModel:
        """The base, on meta.

        Raises:
            CheckpointError: If it is not on disk or hub, or is another one.
        """
        if self.base is None:
            raise CheckpointError(
                "the adapter is of random weights, which are in no file. Merge it in the run that trains it, by the "
                "callback HuggingFaceExport with merge=True."
            )
        model = from_pretrained(self.base, revision=self.revision)
        directory = source_directory(model)
        assert directory is not None
        if self.fingerprint is not None and fingerprint(directory) != self.fingerprint:
            raise CheckpointError(
                f"the adapter was trained on other weights than those of {self.base}: another revision, or another "
                "model. Name the base that it was trained on with --model."
            )
        return model


def adapter_of_run(saved: SavedWeights, base: str | None = None) -> SavedAdapter:
    """The adapter in a checkpoint that holds no base.

    Args:
        saved: The checkpoint.
        base: The base, where it is not where the checkpoint says.

    Raises:
        CheckpointError: If there are several, or names differ.
    """
    if len(saved.bases) != 1:
        raise CheckpointError(f"the checkpoint has adapters of {len(saved.bases)} models; one is needed.")
    ((name, described),) = saved.bases.items()
    prefix = f"{name}." if name else ""
    model = put_in_again(meta_model(AutoConfig.for_model(**saved.configs[name])), described["adapters"])
    for experts in adapter.experts_modules(model).values():
        hold_per_expert(model, experts)
    state = model.state_dict()
    unknown = [key for key in saved.tensors if key.removeprefix(prefix) not in state and key.startswith(prefix)]
    missing = [key for key, p in model.named_parameters() if p.requires_grad and prefix + key not in saved.tensors]
    if unknown or missing:
        raise CheckpointError(
            f"the checkpoint does not fit its adapters. Missing: {missing[:4] or 'none'}; unknown: "
            f"{unknown[:4] or 'none'}."
        )
    return SavedAdapter(
        model,
        base or described["model"],
        described["revision"] if base is None else None,
        lambda key: saved.read(prefix + key) if prefix + key in saved.tensors else None,
        described["fingerprint"] if described["model"] is not None else None,
    )


def adapter_of_peft(path: str, base: str | None = None) -> SavedAdapter:
    """The adapter in a directory of PEFT, or on the hub; arguments and errors as those of `adapter_of_run`."""
    config = read_config(directory := find_adapter(path))
    base, revision = base or base_of_peft(directory), None if base is not None else config.revision
    model = from_pretrained(base, revision=revision)
    add_adapter(model, LoRA(pretrained=str(directory)))
    state = model.state_dict()
    return SavedAdapter(model, base, revision, lambda key: None if state[key].is_meta else state[key])


def is_adapter(path: Path) -> bool:
    """Whether a path is a directory with an adapter of PEFT."""
    return (path.expanduser() / "adapter_config.json").exists()


def base_of_peft(directory: Path) -> str:
    """The base that an adapter of PEFT names.

    Raises:
        CheckpointError: If it names none.
    """
    base = read_config(directory).base_model_name_or_path
    if not base:
        raise CheckpointError(f"{directory} does not say which model it is an adapter of: name that with --model.")
    return base


def open_base(described: Mapping[str, Any], config: Mapping[str, Any], base: str | None) -> PreTrainedModel:
    """The model that a checkpoint has an adapter of, on meta. Every rank must call it.

    Args:
        described: What the checkpoint says of it.
        config: Its configuration.
        base: The base, where it is not where the checkpoint says.
    """
    if described["model"] is None:
        return from_config(config_of(config))
    return from_pretrained(base or described["model"], revision=described["revision"] if base is None else None)


def put_in_again(model: PreTrainedModel, configs: Mapping[str, Mapping[str, Any]]) -> PreTrainedModel:
    """Puts the adapter that a checkpoint describes into a model, and returns that.

    Raises:
        CheckpointError: If there are several, or it is none of LoRA.
    """
    from peft import LoraConfig, PeftConfig

    if len(configs) != 1:
        raise CheckpointError(f"the checkpoint's model has {len(configs)} adapters ({', '.join(configs)}); not one.")
    (values,) = configs.values()
    config = PeftConfig.from_peft_type(**values)
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"the checkpoint's adapter is of the method {config.peft_type}, and not of LoRA.")
    put_in(model, config)
    return model
