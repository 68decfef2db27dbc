"""Reading a model's own tensor-parallel plan into styles, and refusing what it does not cover."""

from __future__ import annotations

import inspect
from typing import NoReturn

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.layout import ParallelLayout
from lightning_ep.tensor_parallel.styles import (
    Colwise,
    GatherOutput,
    Rowwise,
    SequenceLength,
    SplitInput,
    WholeRows,
    WholeSequence,
)
from lightning_ep.tensor_parallel.vocabulary import VocabularyEmbedding, VocabularyHead

_COLWISE = {"colwise": False, "colwise_gather_output": True, "colwise_rep": True}  # whether the output is gathered
_ROWWISE = {"rowwise": False, "rowwise_split_input": True, "rowwise_rep": True}  # whether the input is whole
# Parameters that every rank keeps. How their gradients sum needs no style of its own: those of all such parameters do.
_REPLICATED = {"replicate", "replicated_with_grad_allreduce", "mla_kv_a_proj"}
_LOCAL = "local_params"  # of a module that computes with this rank's part of its own parameters
_POSITIONS = {"position_embeddings", "position_ids"}
_OF_SEQUENCES = {*_POSITIONS, "attention_mask", "cache_params"}


def tensor_plan(model: PreTrainedModel, layout: ParallelLayout) -> dict[str, ParallelStyle]:
    """The styles, by module name, that split a model over ``layout.tp`` ranks; what they leave out is replicated.

    Attention, dense MLPs and shared experts follow the model's own plan (``base_model_tp_plan`` of its config);
    embedding and head are split over the vocabulary; experts are left to expert parallelism.

    Args:
        model: A transformers model, not sharded yet.
        layout: The layout.

    Raises:
        ValueError: If the model has no such plan for its attention, the plan has a style that is not known here, or a
            size is not divisible by ``tp``.
    """
    return {**_Stack(model, layout).plan(), **_vocabulary_plan(model, layout)}


class _Stack:
    """The decoder layers of a model, and what its plan says about them."""

    def __init__(self, model: PreTrainedModel, layout: ParallelLayout) -> None:
        self.model = model
        self.layout = layout
        # Towers, and what projects, are whole on every rank, which sees the images of all.
        beside = {child for part in adapter.optional_parts(model) for child in part.modules()}
        self.modules = {name: module for name, module in model.named_modules() if module not in beside}
        apart = tuple(f"{name}." for name, module in model.named_modules() if module in beside)
        ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
        self.styles = {
            name: style
            for name, style in adapter.tensor_parallel_styles(model).items()
            if id(self.modules.get(name)) not in ends and not f"{name}.".startswith(apart)
        }
        self.experts = adapter.experts_modules(model)
        layers = {id(layer) for layer in adapter.decoder_layers(model)}
        self.layers = [name for name, module in self.modules.items() if id(module) in layers]
        mixers = adapter.whole_sequence_mixers(model)
        self.mixers = {name for name in mixers if name in self.modules}

    def plan(self) -> dict[str, ParallelStyle]:
        splits = {name: style for name, style in self.styles.items() if style not in _REPLICATED}
        self._check_attention(splits)
        vectors = self._vectors(splits)
        linears = {name: style for name, style in splits.items() if style != _LOCAL and name not in vectors}
        regions = self._regions(linears)
        self._check_covered(regions)
        owners = {name.rpartition(".")[0].rpartition(".")[0] for name in self.layers}
        if len(owners) != 1:
            self._refuse(f"it has decoder layers in several places ({sorted(owners)}), and only text models are served")
        parts = {part: (name, style) for name, style in linears.items() for part in self._parts(name, style)}
        for part, (_, style) in parts.items():
            self._check_linear(part, style)
        heads_are_split = (regions[_parent(name)] and style == "colwise" for name, style in linears.items())
        if any(heads_are_split):
            self.layout.check_key_value_heads(*adapter.attention_heads(self.model), type(self.model).__name__)
        length = SequenceLength()
        plan: dict[str, ParallelStyle] = {self.layers[0]: SplitInput(length), owners.pop(): GatherOutput()}
        for name, is_attention in regions.items():
            ends_whole = not any(_parent(linear) == name and style in _ROWWISE for linear, style in linears.items())
            own = tuple(vector.rpartition(".")[2] for vector in vectors if _parent(vector) == name)
            plan[name] = WholeSequence(length, own, ends_whole) if is_attention else WholeRows()
        for part, (name, style) in parts.items():
            if style in _COLWISE:
                plan[part] = Colwise(_COLWISE[style])
            else:
                plan[part] = Rowwise(_ROWWISE[style], regions[_parent(name)])
        return plan

    def _check_attention(self, splits: dict[str, str]) -> None:
        if not any(_arguments(self.modules[_parent(name)]) & _OF_SEQUENCES for name in splits):
            self._refuse(
                "its config has no tensor-parallel plan for attention (`base_model_tp_plan`), so that every rank would "
                "compute all of it"
            )

    def _vectors(self, splits: dict[str, str]) -> set[str]:
        """Parameters of attention itself of which a rank holds those of its heads: sinks, biases of gates."""
        vectors = {name for name in splits if name not in self.modules and splits.get(_parent(name)) == _LOCAL}
        for name in vectors:
            size = self.model.get_parameter(name).shape[0]
            if splits[name] != "colwise" or size % self.layout.tp != 0:
                self._refuse(f"it does not divide the {size} elements of {name} ({splits[name]!r} in its plan)")
        return vectors

    def _parts(self, name: str, style: str) -> list[str]:
        """What of a layer is split: itself or, with LoRA, the layer inside and the factor that has those features.

        The other factor stays whole. Behind a split output B makes this rank's part; in front of a split input A makes
        partial sums, which are scattered like those of the layer before B sees them.
        """
        module = self.modules.get(name)
        if module is None or not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            return [name]
        if any(isinstance(child, nn.Dropout) for child in module.modules()):
            self._refuse(f"{name} has an adapter with lora_dropout, which would drop other elements on every rank")
        if getattr(module, "lora_variant", None):
            self._refuse(f"{name} has a variant of LoRA (use_dora), which reads whole weights")
        factor = "lora_B" if style in _COLWISE else "lora_A"
        return [f"{name}.base_layer", *(f"{name}.{factor}.{key}" for key in module.get_submodule(factor)._modules)]

    def _regions(self, linears: dict[str, str]) -> dict[str, bool]:
        """The modules that see whole sequences, with whether they are attention: those around split linear layers."""
        regions: dict[str, bool] = {}
        for name, style in linears.items():
            if style not in _COLWISE and style not in _ROWWISE:
                self._refuse(f"its plan has the style {style!r} ({name}), which is not known here")
            region = _parent(name)
            arguments = _arguments(self.modules[region])
            regions[region] = bool(arguments & _OF_SEQUENCES)
            told = arguments & _POSITIONS or region in self.mixers or getattr(self.modules[region], "is_causal", False)
            if regions[region] and not told:
                self._refuse(f"{region} takes none of {sorted(_POSITIONS)}, by which the length of sequences is known")
            if any(experts.startswith(f"{region}.") for experts in self.experts):
                self._refuse(f"its plan splits {name} in a mixture-of-experts block, which has split sequences")
        for region in regions:
            styles = {style for name, style in linears.items() if _parent(name) == region}
            # What is gathered behind every layer ends whole, and is split again.
            ends_whole = regions[region] and all(_COLWISE.get(style, False) for style in styles)
            if not ends_whole and styles.isdisjoint(_ROWWISE):
                self._refuse(f"its plan has no row-wise layer at the end of {region}")
            if "rowwise" in styles and "colwise" not in styles:
                self._refuse(f"its plan splits the input of the last layer of {region}, and no output before it")
            if any(region.startswith(f"{outer}.") for outer in regions):
                self._refuse(f"its plan splits {region} inside of another module that it splits")
        return regions

    def _check_covered(self, regions: dict[str, bool]) -> None:
        for layer in self.layers:
            if of_tokens := sorted(key for key in _arguments(self.modules[layer]) if "token" in key or "input" in key):
                self._refuse(f"{layer} takes {of_tokens} of whole sequences beside hidden states, which are split")
            for name, module in self.modules[layer].named_modules(prefix=layer):
                inside = any(name == region or name.startswith(f"{region}.") for region in regions)
                if name != layer and not inside and _arguments(module) & _OF_SEQUENCES:
                    self._refuse(f"its plan does not cover {name}, so that every rank would compute all of it")

    def _check_linear(self, name: str, style: str) -> None:
        module = self.modules.get(name)
        if module is None:
            self._refuse(f"its plan splits {name}, which is a parameter and not an nn.Linear")
        if type(module) is not nn.Linear:
            self._refuse(f"its plan splits {name}, which is {_other_than(nn.Linear, module)}")
        size, what = (module.out_features, "out") if style in _COLWISE else (module.in_features, "in")
        if size % self.layout.tp != 0:
            self._refuse(f"it does not divide the {size} {what}put features of {name}")

    def _refuse(self, reason: str) -> NoReturn:
        _refuse(self.model, self.layout, reason)


def _vocabulary_plan(model: PreTrainedModel, layout: ParallelLayout) -> dict[str, ParallelStyle]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding) or type(embedding).forward is not nn.Embedding.forward:
        _refuse(model, layout, f"its embedding is {_other_than(nn.Embedding, embedding)}")
    if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
        _refuse(model, layout, "its embedding uses max_norm, scale_grad_by_freq or sparse gradients")
    if head is not None and type(head) is not nn.Linear:
        _refuse(model, layout, f"its head is {_other_than(nn.Linear, head)}")
    for module in (embedding, head):
        size = layout.tp if module is None else module.weight.shape[0]
        if size % layout.tp != 0:
            fix = f"`model.resize_token_embeddings(pad_to_multiple_of={layout.tp})` makes it so"
            _refuse(model, layout, f"it does not divide the vocabulary of {size} of {names[id(module)]} ({fix})")
    plan: dict[str, ParallelStyle] = {names[id(embedding)]: VocabularyEmbedding()}
    if head is not None:
        plan[names[id(head)]] = VocabularyHead(embedding if adapter.tied(model) else None)
    return plan


def _other_than(kind: type[nn.Module], module: nn.Module) -> str:
    """What ``module`` is, where only a plain ``kind`` can be split; in full, for classes of peft have torch's names."""
    name, plain = f"{type(module).__module__}.{type(module).__qualname__}", f"nn.{kind.__name__}"
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return f"an adapter ({name}) around a layer: tp splits plain {plain} layers only, no LoRA or the like"
    if isinstance(module, kind):
        return f"{name}, a subclass of {plain} that may do more: tp splits plain {plain} layers only"
    return f"{name} and not an {plain}"


def _refuse(model: PreTrainedModel, layout: ParallelLayout, reason: str) -> NoReturn:
    raise ValueError(
        f"tp={layout.tp} does not fit {type(model).__name__} ({model.config.model_type!r}): {reason}. Expert "
        f"parallelism needs no such plan: use tp=1 with the same ep={layout.ep}, fsdp={layout.fsdp}."
    )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _arguments(module: nn.Module) -> set[str]:
    return set(inspect.signature(module.forward).parameters)
