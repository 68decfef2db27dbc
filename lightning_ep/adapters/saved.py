"""Adapters that are saved, in a checkpoint of a run or by PEFT, and the base that they say they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class NamedBase(NamedTuple):
    """A base, as an adapter, a checkpoint or a user names it.

    Attributes:
        model: Hub id or path.
        revision: That on the hub, if one is named.
    """

    model: str
    revision: str | None = None


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter in files.

    Attributes:
        model: The model that has it, whose base is on meta.
        base: The base; None if that was drawn.
        read: Gives what is saved of the model's tensors by name, whole and on the CPU; None of others.
        fingerprint: Of the base's tensors, where it is known.
    """

    model: PreTrainedModel
    base: NamedBase | None
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
        model = from_pretrained(self.base.model, revision=self.base.revision)
        directory = source_directory(model)
        assert directory is not None
        if self.fingerprint is not None and fingerprint(directory) != self.fingerprint:
            raise CheckpointError(
                f"the adapter was trained on other weights than those of {self.base.model}: another revision, or "
                "another model. Name the base that it was trained on with --model."
            )
        return model


def adapter_of_run(saved: SavedWeights, base: NamedBase | None = None) -> SavedAdapter:
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
        base or base_of_run(described),
        lambda key: saved.read(prefix + key) if prefix + key in saved.tensors else None,
        described["fingerprint"] if described["model"] is not None else None,
    )


def adapter_of_peft(path: str, base: NamedBase | None = None) -> SavedAdapter:
    """The adapter in a directory of PEFT, or on the hub; arguments and errors as those of `adapter_of_run`."""
    directory = find_adapter(path)
    base = base or base_of_peft(directory)
    model = from_pretrained(base.model, revision=base.revision)
    add_adapter(model, LoRA(pretrained=str(directory)))
    state = model.state_dict()
    return SavedAdapter(model, base, lambda key: None if state[key].is_meta else state[key])


def is_adapter(path: Path) -> bool:
    """Whether a path is a directory with an adapter of PEFT."""
    return (path.expanduser() / "adapter_config.json").exists()


def base_of_peft(directory: Path) -> NamedBase:
    """The base that an adapter of PEFT names.

    Raises:
        CheckpointError: If it names none.
    """
    config = read_config(directory)
    if not config.base_model_name_or_path:
        raise CheckpointError(f"{directory} does not say which model it is an adapter of: name that with --model.")
    return NamedBase(config.base_model_name_or_path, config.revision)


def base_of_run(described: Mapping[str, Any]) -> NamedBase | None:
    """The base that a checkpoint describes; None if that was drawn."""
    return None if described["model"] is None else NamedBase(described["model"], described["revision"])


def open_base(described: Mapping[str, Any], config: Mapping[str, Any], base: NamedBase | None) -> PreTrainedModel:
    """The model that a checkpoint has an adapter of, on meta. Every rank must call it.

    Args:
        described: What the checkpoint says of it.
        config: Its configuration.
        base: The base, where it is not where the checkpoint says.
    """
    named = base_of_run(described)
    if named is None:
        return from_config(config_of(config))
    base = base or named
    return from_pretrained(base.model, revision=base.revision)


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
