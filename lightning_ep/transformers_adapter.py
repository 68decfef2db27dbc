"""All that touches names of transformers that are not its public API: plans, the experts interface, init rules."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.activations import SiLUActivation
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
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, _default_apply_gate
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_ep.moe import moe_forward
from lightning_ep.ops.registered_experts import ExpertsFunction
from lightning_ep.recompute import handle_replay, left_to_checkpoint

if TYPE_CHECKING:
    from lightning_ep.masters import Masters
    from lightning_ep.plan import ExpertContext

EXPERTS_IMPLEMENTATION = "lightning_ep"
FUSED_PARAMETERS = ("gate_up_proj", "down_proj")
_CONTEXT = "_lightning_ep_context"
_DISPATCHED_EXPERTS = "ep_dispatch_experts"


def pretrained_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost transformers models inside ``module`` (itself included), by name."""
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        inside = any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(child, PreTrainedModel) and not inside:
            found[name] = child
    return found


def experts_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The experts modules that the model's own expert-parallel plan names, by their name inside ``model``."""
    patterns = [name for name, style in (model.ep_plan or {}).items() if style == _DISPATCHED_EXPERTS]
    matches = [_matcher(pattern) for pattern in patterns]
    return {name: child for name, child in model.named_modules() if any(match(name) for match in matches)}


def _matcher(pattern: str) -> Callable[[str], object]:
    """Matches the names that a plan's pattern stands for."""
    return re.compile(re.escape(pattern).replace(r"\*", r"\d+")).fullmatch


def tensor_parallel_styles(model: PreTrainedModel) -> dict[str, str]:
    """The styles of the model's own tensor-parallel plan, by the module or parameter they are for, without experts."""
    experts = experts_modules(model)
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    found: dict[str, str] = {}
    for pattern, style in (model.tp_plan or {}).items():
        match = _matcher(pattern)
        found |= {name: style for name in names if match(name)}
    return {k: v for k, v in found.items() if k not in experts and not any(k.startswith(f"{e}.") for e in experts)}


def attention_heads(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of query heads and of key/value heads."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated blocks that the model declares must not be split; the unit of FSDP."""
    names = set(model._no_split_modules or ())
    return [child for child in model.modules() if type(child).__name__ in names]


def routers(models: Iterable[PreTrainedModel]) -> set[nn.Module]:
    """The routers of ``models``: what they declare to give router logits, if it has no experts."""
    models = list(models)
    inner = [child for model in models for child in model.modules() if isinstance(child, PreTrainedModel)]
    recorders = [(child._can_record_outputs or {}).get("router_logits") for child in inner]
    classes = tuple({getattr(recorder, "target_class", recorder) for recorder in recorders if recorder is not None})
    experts = {child for model in models for child in experts_modules(model).values()}
    declared = {child for model in models for child in model.modules() if isinstance(child, classes)}
    return {child for child in declared if not experts & set(child.modules())}


def refuse_own_checkpointing(model: PreTrainedModel, reason: str) -> None:
    """Makes turning on the activation checkpointing of transformers a ValueError."""

    # transformers reads the names of its parameters.
    def refuse(enable: bool = True, gradient_checkpointing_func: object = None, every_n_layers: int = 1) -> None:
        if enable:
            raise ValueError(reason)

    for child in model.modules():
        if isinstance(child, PreTrainedModel):
            child._set_gradient_checkpointing = refuse  # type: ignore[method-assign]


def tied(model: PreTrainedModel) -> bool:
    """Whether the input embedding and the output head are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def why_not_fused(module: nn.Module) -> str | None:
    """What keeps an experts module from `FusedExperts`, by the flags that its class declares; None if nothing does."""
    declared = {
        "has_gate": (True, "its experts have no gate"),
        "has_bias": (False, "its experts have biases"),
        "is_transposed": (False, "its weights are stored transposed"),
        "is_concatenated": (True, "its gate and up projections are interleaved"),
        "has_post_expert_norm": (False, "its experts end with a norm"),
    }
    for flag, (served, reason) in declared.items():
        if getattr(module, flag, None) is not served:
            return reason
    if {name for name, _ in module.named_parameters()} != set(FUSED_PARAMETERS):
        return f"its parameters are not {' and '.join(FUSED_PARAMETERS)}"
    if type(module)._apply_gate is not _default_apply_gate:  # type: ignore[attr-defined]
        return "it has a gate function of its own"
    if not isinstance(module.act_fn, nn.SiLU | SiLUActivation):
        return f"its activation is {type(module.act_fn).__name__}, not SiLU"
    return None


def local_experts_function(module: nn.Module, name: str) -> ExpertsFunction:
    """The function that runs the experts of one device.

    Args:
        module: The experts module.
        name: ``"auto"`` (grouped GEMMs where torch has a kernel, else eager), ``"eager"`` or a name in transformers'
            ``ExpertsInterface``.

    Raises:
        ValueError: If no such implementation is registered.
    """
    if name == "auto":
        return _auto_experts
    names = sorted({"eager", *ALL_EXPERTS_FUNCTIONS} - {EXPERTS_IMPLEMENTATION})
    if name not in names:
        raise ValueError(
            f"experts_implementation={name!r} is not registered; choose 'auto', 'fused' or one of {names}."
        )
    return _registered(module, name)


def _registered(module: nn.Module, name: str) -> ExpertsFunction:
    # The decorator that lets a model pick its implementation wraps the model's own (eager) forward.
    eager: ExpertsFunction = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, eager)


def _auto_experts(module: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    # Grouped GEMMs are fast on CUDA in bf16 with rows of a multiple of 16 bytes; elsewhere they loop too, and the eager
    # experts skip those that received nothing.
    aligned = all(size % 8 == 0 for param in module.parameters(recurse=False) for size in param.shape[1:])
    fast = hidden_TH.is_cuda and hidden_TH.dtype == torch.bfloat16 and aligned
    function = _registered(module, "grouped_mm" if fast else "eager")
    return function(module, hidden_TH, ids_TK, weights_TK)


def attach_context(module: nn.Module, context: ExpertContext) -> None:
    """Makes ``module`` an expert-parallel one: from now on its forward goes through ``context``."""
    setattr(module, _CONTEXT, context)


def masters_of(module: nn.Module) -> Masters:
    """The `Masters` of a module for which `attach_context` was called."""
    context: ExpertContext = getattr(module, _CONTEXT)
    return context.masters


def is_parallel_experts(module: nn.Module) -> bool:
    """Whether `attach_context` was called on ``module``."""
    return hasattr(module, _CONTEXT)


def use_expert_parallel_forward(model: PreTrainedModel) -> None:
    """Selects our function in the experts interface for the whole model."""
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)


@contextmanager
def without_packing() -> Iterator[None]:
    """For forwards of models that number the positions themselves: each row of the batch is one sequence.

    transformers looks for packed sequences in the position ids that it has just made, and the host waits for the answer
    of the GPU in every forward. It has no argument that says so.
    """
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found


# Opaque to torch.compile: its sizes are not known before it runs, and its kernels are already fused.
@torch.compiler.disable
def _experts_forward(module: nn.Module, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    context: ExpertContext | None = getattr(module, _CONTEXT, None)
    if context is None:
        # A model that shares its config object with a parallelised one shares the implementation name too.
        return _auto_experts(module, hidden_TH, ids_TK, weights_TK)
    handle_replay(module)
    params = [getattr(module, name) for name in context.param_names]
    dispatcher, experts, masters = context.dispatcher, context.experts, context.masters
    return moe_forward(dispatcher, experts, hidden_TH, ids_TK, weights_TK, params, left_to_checkpoint, masters)


ExpertsInterface.register(EXPERTS_IMPLEMENTATION, _experts_forward)


def attention_implementation(model: PreTrainedModel) -> str:
    """The name of the attention implementation that the model uses."""
    return model.config._attn_implementation or "eager"


def select_attention(model: PreTrainedModel, name: str, function: Callable[..., Any] | None = None) -> None:
    """Makes the model use the attention of this name, registered with ``function`` if one is given.

    A registered name without a mask function gets no mask from the model: ``function`` has to know what it attends to.
    """
    if function is not None:
        AttentionInterface.register(name, function)
    model.config._attn_implementation = name


def config_with_attention(config: Any, name: str) -> Any:
    """A shallow copy of the config that names this attention implementation."""
    config = copy(config)
    config._attn_implementation = name
    return config


def attention_function(name: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function of this name; ``eager`` is the one of the module's own file."""
    files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
    eager = next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)
    assert eager is not None or name != "eager"
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]


def is_flash_attention(name: str) -> bool:
    """Whether an attention implementation takes bounds of documents (``cu_seq_lens``) instead of a mask."""
    return name != "eager" and ALL_ATTENTION_FUNCTIONS[name] is flash_attention_forward


def causal_mask(
    name: str,
    batch: int,
    length: int,
    window: int | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """The mask that `create_causal_mask` would make, without waiting for the device.

    Args:
        name: The attention implementation.
        batch: Number of rows.
        length: Tokens per row.
        window: Sliding window, or None.
        position_ids: ``[B, S]``, which restart where a document begins; without effect if there is a mask.
        attention_mask: ``[B, S]``, zero at padding.
        dtype: Of the attention scores.
        device: Where the mask goes.
    """
    allowed = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    if attention_mask is not None:
        allowed = and_masks(allowed, padding_mask_function(attention_mask.bool()))
    elif position_ids is not None:
        documents = (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
        allowed = and_masks(allowed, packed_sequence_mask_function(documents))
    return ALL_MASK_ATTENTION_FUNCTIONS[name](
        batch_size=batch,
        q_length=length,
        kv_length=length,
        mask_function=allowed,
        allow_is_causal_skip=False,
        dtype=dtype,
        device=device,
    )


def why_not_context_parallel(model: PreTrainedModel) -> str | None:
    """What keeps a model's sequences from being split over ranks, None if nothing does.

    Exact attention over pieces needs every exchange between tokens to be causal softmax attention that goes through the
    attention interface, and every other computation to need nothing but a token and its position.
    """
    config = model.config
    types = set(getattr(config, "layer_types", None) or ())
    other_types = types - {"full_attention", "sliding_attention"}
    if config.get_text_config() is not config:
        return "it has parts other than a language model, whose inputs are no tokens"
    if not model._supports_attention_backend:
        return "its attention does not go through transformers' attention interface"
    if other_types:
        return (
            f"it has layers of the types {sorted(other_types)}, and only softmax attention over all keys can be split"
        )
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    if model.loss_type not in (None, "ForCausalLM"):
        return f"its loss ({model.loss_type}) is not one of next tokens"
    if (name := attention_implementation(model)) not in ALL_MASK_ATTENTION_FUNCTIONS:
        return f"it is not known which masks its attention implementation {name!r} takes"
    if rope := _length_dependent_rope(config):
        return f"its rotary frequencies (rope_type={rope!r}) depend on the longest position of a rank's piece"
    sliding = bool(getattr(config, "sliding_window", None)) or "sliding_attention" in types
    return next((reason for layer in decoder_layers(model) if (reason := _why_not_split(layer, sliding))), None)


def _why_not_split(layer: nn.Module, sliding: bool) -> str | None:
    name, modules = type(layer).__name__, list(layer.modules())
    sources = (_forward_source(type(module)) for module in modules)  # type: ignore[arg-type]  # hashable
    attention = [source for source in sources if "ALL_ATTENTION_FUNCTIONS" in source]
    others = [type(m).__name__ for m in modules if isinstance(m, nn.Conv1d) or "Indexer" in type(m).__name__]
    if not attention:
        return f"its {name} has no attention that goes through transformers' attention interface"
    if others:
        return f"its {name} lets tokens see each other outside of attention ({others[0]})"
    if sliding and not all("sliding_window=" in source for source in attention):
        return f"the attention of its {name} has a sliding window of which it does not tell its implementation"
    return None


def _length_dependent_rope(config: Any) -> str | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    types = [str(entry.get("rope_type")) for entry in nested]
    return next((name for name in types if "dynamic" in name or name == "longrope"), None)


@cache
def _forward_source(cls: Any) -> str:
    try:
        return inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return ""  # so that it is refused: nobody can tell what it does


def init_rules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Every submodule with the model whose initialisation rules are responsible for it."""
    owners: dict[str, PreTrainedModel] = {}
    for name, child in model.named_modules():
        owner = child if isinstance(child, PreTrainedModel) else owners[name.rpartition(".")[0]]
        owners[name] = owner
        yield name, child, owner


def apply_init_rule(owner: PreTrainedModel, module: nn.Module) -> None:
    """Initialises in place the parameters and buffers of ``module`` that are not marked as done."""
    owner._init_weights(module)


def mark_initialized(tensor: Tensor) -> Tensor:
    """Marks a tensor so that the initialisation rules leave it alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


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

    def run(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Converts.

        Args:
            model: The model, of whose parameters some operations need the shapes.
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
    model: PreTrainedModel, transforms: Sequence[WeightTransform], keys: Iterable[str]
) -> tuple[list[Conversion], list[str]]:
    """Groups the tensors of a checkpoint by the parameters that they become, as `from_pretrained` does.

    Args:
        model: The model.
        transforms: `hub_transforms` of it.
        keys: Names in the checkpoint, in the hub's layout or the model's own.

    Returns:
        The conversions, and the names that become nothing in this model.
    """
    transforms = deepcopy(list(transforms))  # some remember what they have seen
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: t for t in converters for pattern in t.source_patterns}
    names = dict(model.state_dict())
    prefix = model.base_model_prefix
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


def is_optional(model: PreTrainedModel, name: str, in_checkpoint: bool) -> bool:
    """Whether the model declares that a name may be only in the checkpoint, or only in the model."""
    if in_checkpoint:
        patterns = set(model._keys_to_ignore_on_load_unexpected or ())
        # Buffers that older checkpoints contain; transformers passes over them for every family.
        patterns |= {r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"}
    else:
        patterns = set(model._keys_to_ignore_on_load_missing or ())
    return any(re.search(pattern, name) for pattern in patterns)


def not_saved(model: PreTrainedModel, name: str) -> bool:
    """Whether the model declares that a name is not to be saved."""
    return name in (model._keys_to_ignore_on_save or ())
