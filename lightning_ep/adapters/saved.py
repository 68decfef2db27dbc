"""Adapters that are saved, in a checkpoint of a run or by PEFT, and the base that they say they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.adapters.factors import hold_flat, hold_per_expert
from lightning_ep.adapters.lora import LoRA, add_adapter, put_in
from lightning_ep.adapters.pretrained import find_adapter, read_config
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import check_bases, config_fingerprint, fingerprint, note_bases
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
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
        model = from_config(config_of(config))
        if config_fingerprint(model) != described["fingerprint"]:
            # Checkpoints name the class, also where the run's configuration did not.
            model = from_config(config_of({**config, "architectures": None}))
        return model
    base = base or named
    return from_pretrained(base.model, revision=base.revision)


def open_adapted(
    saved: SavedWeights, name: str, base: str | None, lora: LoRA | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that a checkpoint has an adapter of, with that, on meta, and arguments of a `CausalLM` around it.

    Args:
        saved: The checkpoint.
        name: Which of its models.
        base: Hub id or path of the base, where it is not where the checkpoint says.
        lora: The adapter; default: as the checkpoint says.

    Raises:
        CheckpointError: If the base is not there, or the adapter is none of LoRA.
        TypeError: If the base is a configuration.
    """
    described, config = saved.bases[name], saved.configs[name]
    if base is not None and not isinstance(base, str):
        raise TypeError(
            f"{saved.path} holds adapters only: `model` says where their base is (hub id or path), and was a "
            f"{type(base).__name__}. Leave it out to have it from where the checkpoint says."
        )
    named = base_of_run(described)
    if named is not None and base is not None:
        named = NamedBase(base)
    try:
        model = open_base(described, config, named)
    except CheckpointError as error:
        raise CheckpointError(
            f"{saved.path} holds adapters only, and their base cannot be opened: {error} Where the base has another "
            "place now, pass that as `model`."
        ) from error
    if lora is None:
        put_in_again(model, described["adapters"])
        lora = _lora_of(described["adapters"])
    else:
        add_adapter(model, lora)
    if named is None:
        return model, {"model": model.config, "pretrained": False, "adapter": lora}
    return model, {"model": named.model, "adapter": lora}


def source_of_whole(saved: SavedWeights, name: str, given: Any, lora: LoRA | None) -> Any:
    """What to build a model from that a checkpoint holds whole: what was given, or the configuration in it.

    Raises:
        CheckpointError: If there is none, or if the checkpoint has adapters and no ``lora`` says how they are scaled.
    """
    if given is None and name not in saved.configs:
        raise CheckpointError(
            f"{saved.path} does not contain the config of its model: pass `model=` (hub id, path or config)."
        )
    if lora is None and any(".lora_" in key for key in saved.tensors):
        raise CheckpointError(
            f"{saved.path} holds adapters with a model that was in memory when it was adapted, and does not say how "
            "they are scaled: pass the `adapter` of the run that trained them."
        )
    return AutoConfig.for_model(**saved.configs[name]) if given is None else given


def _lora_of(configs: Mapping[str, Mapping[str, Any]]) -> LoRA:
    """What `put_in_again` puts in, in the words of `LoRA`."""
    (values,) = configs.values()
    same = ("r", "lora_alpha", "target_modules", "modules_to_save", "lora_dropout", "use_rslora", "use_dora")
    options: dict[str, Any] = {name: values[name] for name in (*same, "lora_bias")}
    options |= {name: values[name] or None for name in ("rank_pattern", "alpha_pattern")}
    return LoRA(experts=bool(values["target_parameters"]), **options)


def fill_with_base(module: LightningModule, saved: SavedWeights, strict: bool = True) -> None:
    """Gives a module on meta the tensors of a checkpoint and those that it leaves out, whole, on the CPU.

    What a checkpoint leaves out is the base beneath adapters, read from where it is or drawn again, and buffers. The
    factors of experts get the form with which PEFT computes.

    Args:
        module: A module with one transformers model, adapted as the checkpoint's or not at all.
        saved: The checkpoint.
        strict: Whether names must be the same.

    Raises:
        CheckpointError: If names or shapes differ, or the base is another one than that of the run.
    """
    cpu = torch.device("cpu")
    (model,) = adapter.pretrained_models(module).values()
    experts = list(adapter.experts_modules(model).values())
    for outermost in experts:
        hold_per_expert(model, outermost)
    if saved.bases:
        note_bases(module)
        check_bases(module, saved.bases, saved.path)
    saved.fill(module, strict)
    stream_pretrained(module, cpu)
    seeds = [base["seed"] for base in saved.bases.values() if base["seed"] is not None]
    materialize(module, cpu, seed=seeds[0] if seeds else 0)
    for outermost in experts:
        hold_flat(outermost)


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
