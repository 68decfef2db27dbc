"""How the hub's layout of weights becomes the model's, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from lightning_ep.transformers_adapter.structure import called_models


@dataclass(frozen=True, eq=False)
class Blueprint:
    """What loading asks of a model, by the names that its class gives: user code may rename and replace them later.

    Attributes:
        class_name: Name of the model's class.
        config: Its config.
        base_model_prefix: Name of the base model in it.
        tensors: Stand-ins on meta for its parameters and persistent buffers.
        tied: Names of parameters that are another one's, with the name of that one.
        vocabulary: Names of what has a row for every token: the embedding's and the output head's parameters.
        optional: Patterns of names that may be in the checkpoint only (True), or in the model only (False).
    """

    class_name: str
    config: Any
    base_model_prefix: str
    tensors: dict[str, Tensor]
    tied: dict[str, str]
    vocabulary: frozenset[str]
    optional: dict[bool, frozenset[str]]

    def get_parameter(self, name: str) -> Tensor:
        """The stand-in of a parameter; some conversions ask for its shape."""
        return self.tensors[name]

    def is_optional(self, name: str, in_checkpoint: bool) -> bool:
        """Whether the model declares that a name may be only in the checkpoint, or only in the model."""
        return any(re.search(pattern, name) for pattern in self.optional[in_checkpoint])


def blueprint(model: PreTrainedModel) -> Blueprint:
    """The blueprint of a model as its class builds it; ask before anything is renamed, replaced or sharded."""
    state = model.state_dict(keep_vars=True)
    parts = called_models(model).values()
    ends = [end for part in parts for end in (part.get_input_embeddings(), part.get_output_embeddings())]
    vocabulary = {id(param) for end in ends if end for param in end.parameters()}
    unexpected = set(model._keys_to_ignore_on_load_unexpected or ())
    # Buffers that older checkpoints contain; transformers passes over them for every family.
    unexpected |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    return Blueprint(
        type(model).__name__,
        model.config,
        model.base_model_prefix,
        {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()},
        tied_names(model),
        frozenset(name for name, tensor in state.items() if id(tensor) in vocabulary),
        {True: frozenset(unexpected), False: frozenset(model._keys_to_ignore_on_load_missing or ())},
    )


@dataclass
class Conversion:
    """Some tensors under one side's names (hub or model) that become tensors under the other's.

    Attributes:
        target: Name of the (first) tensor that comes out, with wildcards where there are several.
        sources: Names of the tensors that go in, by the pattern that matched them, in transformers' order.
    """

    target: str
    sources: dict[str, list[str]] = field(default_factory=dict)
    _converter: WeightConverter | None = None
    _renamings: Sequence[WeightRenaming] = ()

    @property
    def inputs(self) -> list[str]:
        """All names that go in."""
        return [key for keys in self.sources.values() for key in keys]

    def run(self, model: PreTrainedModel | Blueprint, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts.

        Args:
            model: The model, or its blueprint; of its parameters some operations need the shapes.
            tensors: The tensors that go in, by name.

        Returns:
            The tensors that come out, by name.
        """
        if self._converter is None:
            return {self.target: tensors[self.inputs[0]]}
        converter = deepcopy(self._converter)
        for pattern, keys in self.sources.items():
            for key in keys:
                converter.add_tensor(self.target, key, pattern, tensors[key])  # type: ignore[arg-type]
        converted = converter.convert(self.target, model=model, config=model.config)
        renamings = list(self._renamings)
        return {
            apply_renamings(name, renamings): value[0] if isinstance(value, list) else value
            for name, value in converted.items()
        }


def hub_transforms(model: PreTrainedModel, saving: bool = False) -> list[WeightTransform]:
    """How the hub's layout of this family becomes the model's; ask before FSDP renames the model's classes.

    Args:
        model: The model.
        saving: Leave out what cannot be reverted: old names, and prefixes that a checkpoint may or may not have had.
    """
    transforms = get_model_conversion_mapping(model, add_legacy=not saving)
    return [t for t in transforms if not (saving and isinstance(t, PrefixChange))]


def load_conversions(
    model: Blueprint, transforms: Sequence[WeightTransform], keys: Iterable[str]
) -> tuple[list[Conversion], list[str]]:
    """Groups the tensors of a checkpoint by the parameters that they become, as `from_pretrained` does.

    Args:
        model: The model's blueprint.
        transforms: `hub_transforms` of the model.
        keys: Names in the checkpoint, in the hub's layout or the model's own.

    Returns:
        The conversions, and the names that become nothing in this model.
    """
    transforms = deepcopy(list(transforms))  # some remember what they have seen
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    names, prefix = model.tensors, model.base_model_prefix
    found: dict[str, Conversion] = {}
    unexpected: list[str] = []
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if name not in names and key in names:
            name, pattern = rename_source_key(key, [], [], prefix, names)
        if name not in names:
            unexpected.append(key)
            continue
        if name not in found:
            found[name] = Conversion(name, _converter=by_pattern[pattern] if pattern is not None else None)
        found[name].sources.setdefault(key if pattern is None else pattern, []).append(key)
    return list(found.values()), unexpected


def export_conversions(transforms: Sequence[WeightTransform], names: Iterable[str]) -> list[Conversion]:
    """Groups parameters by the tensors that they become in the hub's layout, as `save_pretrained` does.

    Args:
        transforms: `hub_transforms` of the model, for saving.
        names: Names of the model's parameters and persistent buffers.
    """
    reverse = [t.reverse_transform() for t in deepcopy(list(transforms))[::-1]]
    renamings = [t for t in reverse if isinstance(t, WeightRenaming)]
    converters = [t for t in reverse if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    found: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = apply_converters(name, converters)
        if pattern is None:
            target = apply_renamings(name, renamings)
        if target not in found:
            converter = by_pattern[pattern] if pattern is not None else None
            found[target] = Conversion(target, _converter=converter, _renamings=renamings)
        found[target].sources.setdefault(name if pattern is None else pattern, []).append(name)
    return list(found.values())


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Names of parameters that are another one's, with the name of that one."""
    return dict(model.all_tied_weights_keys or {})


def peft_configs(model: Any) -> Mapping[str, Any]:
    """The configurations of the adapters that PEFT has put into a module, by their names; empty where it has none."""
    return getattr(model, "peft_config", None) or {}


def saves_adapters(model: PreTrainedModel) -> bool:
    """Whether `save_pretrained` of the model writes adapters alone, those of its `add_adapter`."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def not_saved(model: PreTrainedModel, name: str) -> bool:
    """Whether the model declares that a name is not to be saved."""
    return name in (model._keys_to_ignore_on_save or ())
