"""What is where in a transformers model, as it declares it: experts, routers, layers, and its own parallel plans."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from lightning_ep.transformers_adapter.record import recall, remember

_DISPATCHED_EXPERTS = "ep_dispatch_experts"
_PROJECTS = re.compile(r"merger|project|connector|aligner|^proj\d*$")
_OF_SEQUENCES = {"position_embeddings", "position_ids", "attention_mask", "cache_params"}


def pretrained_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The outermost transformers models inside ``module`` (itself included), by name."""
    found: dict[str, PreTrainedModel] = {}
    for name, child in module.named_modules():
        inside = any(name == outer or name.startswith(f"{outer}." if outer else "") for outer in found)
        if isinstance(child, PreTrainedModel) and not inside:
            found[name] = child
    return found


def called_models(module: nn.Module) -> dict[str, PreTrainedModel]:
    """The transformers models inside ``module`` that are called in forward, by name: the outermost.

    Of one without a forward (Qwen3-Omni whole, whose users call its thinker) they are those with experts inside.
    """
    found: dict[str, PreTrainedModel] = {}
    for outer, model in pretrained_models(module).items():
        inner = {}
        if type(model).forward is nn.Module.forward:
            inside = {
                f"{key}.{name}" if name else key: m
                for key, c in model.named_children()
                for name, m in pretrained_models(c).items()
            }
            inner = {f"{outer}.{name}" if outer else name: m for name, m in inside.items() if experts_modules(m)}
        found |= inner or {outer: model}
    return found


@dataclass(frozen=True)
class _Planned:
    """What is remembered of a model: the names of its experts modules, as its user gave them."""

    names: tuple[str, ...]


def plan_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Has the modules ``names`` inside of ``model`` be its experts, in place of those that it declares."""
    remember(model, _Planned(tuple(names)))


def planned_models(module: nn.Module) -> dict[str, nn.Module]:
    """The models of plain PyTorch inside ``module`` (itself included) of which `plan_experts` was told, by name."""
    planned = {name: child for name, child in module.named_modules() if recall(child, _Planned) is not None}
    return {name: child for name, child in planned.items() if not isinstance(child, PreTrainedModel)}


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of a model, by their name inside it: as its user planned, or else as it declares."""
    planned = recall(model, _Planned)
    if planned is not None:
        return {name: model.get_submodule(name) for name in planned.names}
    assert isinstance(model, PreTrainedModel)
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


def model_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The model's class as transformers has it: FSDP2 replaces it by one derived from it."""
    return next(
        cls for cls in type(model).__mro__ if issubclass(cls, PreTrainedModel) and not issubclass(cls, FSDPModule)
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that the model declares must not be split; the unit of FSDP, sharded or not.

    Of plain PyTorch they are what the outermost lists of modules around experts hold, and lists (stages) inside them.
    """
    if not isinstance(model, PreTrainedModel):
        lists = dict.fromkeys(found for name in experts_modules(model) if (found := _outermost_list(model, name)))
        experts = set(experts_modules(model).values())
        return [layer for found in lists for layer in _called_children(found) if layer not in experts]
    names = set(model._no_split_modules or ())
    return [child for child in model.modules() if _own_class(child).__name__ in names]


def norms_beside_layers(model: nn.Module) -> list[nn.Module]:
    """The norms behind the last decoder layer of a model, or before the first one, of every list of layers."""
    layers = set(decoder_layers(model))
    around = [m for m in model.modules() if any(layers & set(held.children()) for held in m.children())]
    return list(dict.fromkeys(child for module in around for child in module.children() if _is_norm(child)))


def _is_norm(module: nn.Module) -> bool:
    """Whether a module has vectors for parameters, and nothing else."""
    params = list(module.parameters())
    return bool(params) and all(param.ndim == 1 for param in params) and next(module.children(), None) is None


def can_be_called(module: nn.Module) -> bool:
    """Whether a module has a forward: what only holds others (lists, namespaces) or parameters has none."""
    return type(module).forward is not nn.Module.forward


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children of a module and, in place of those that have no forward (lists), their children."""
    for child in module.children():
        if not can_be_called(child):
            yield from _called_children(child)
        else:
            yield child


def _own_class(module: nn.Module) -> type:
    """A module's class as it was before FSDP2 replaced it by one derived from it."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule))


def _outermost_list(model: nn.Module, name: str) -> nn.Module | None:
    parts = name.split(".")
    around = (model.get_submodule(".".join(parts[:length])) for length in range(1, len(parts)))
    return next((outer for outer in around if isinstance(outer, nn.ModuleList | nn.ModuleDict | nn.Sequential)), None)


def number_of_experts(experts: nn.Module) -> int | None:
    """How many experts a module says that it has, or how long its parameters are in front; None if they differ."""
    said = getattr(experts, "num_experts", None)
    if isinstance(said, int):
        return said
    sizes = {param.shape[0] if param.ndim else 0 for param in experts.parameters(recurse=False)}
    return sizes.pop() if len(sizes) == 1 else None


def input_embedding(model: PreTrainedModel) -> nn.Module | None:
    """What looks tokens up; None where a model reads no tokens and names nothing in its place (Wav2Vec2, ResNet)."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def uses_parameters_by_length(model: PreTrainedModel) -> bool:
    """Whether parameters have nothing to do in short sequences: of DeepSeek-V4, what compresses keys."""
    return bool(model.config.get_text_config().model_type.startswith("deepseek_v4"))


def optional_parts(model: PreTrainedModel) -> list[nn.Module]:
    """What stands beside the text of a model and is called only by batches that need it: towers, and what projects.

    Text is what `get_decoder` gives, the model that holds the input embedding, and the head. What else has parameters
    is a part, the largest modules of it, if any has modules inside: one matrix alone is a head of another kind.
    """
    embedding, head = input_embedding(model), model.get_output_embeddings()
    if embedding is None:
        return []
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and embedding in set(m.children())]
    text = {child for part in (model.get_decoder(), *around, embedding, head) if part for child in part.modules()}
    parts = list(_beside(model, text))
    return parts if any(next(part.children(), None) for part in parts) else []


def _beside(module: nn.Module, text: set[nn.Module]) -> Iterator[nn.Module]:
    if text.isdisjoint(module.modules()):
        if next(module.parameters(), None) is not None:
            yield module
    elif module not in text:
        for child in module.children():
            yield from _beside(child, text)


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """What reads texts in a model with other parts beside it, by its decoder; the model itself if it has none."""
    if model.config.get_text_config() is model.config:
        return model
    decoder = model.get_decoder()
    alone = isinstance(decoder, PreTrainedModel) and decoder.config.get_text_config() is decoder.config
    return decoder if alone else model


def towers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The models for images and sound beside the text of a model, by name."""
    parts = {child for part in optional_parts(model) for child in part.modules()}
    found: dict[str, nn.Module] = {}
    for name, child in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if child in parts and isinstance(child, PreTrainedModel) and not inside:
            found[name] = child
    return found


def projects(name: str) -> bool:
    """Whether a child of a tower is what brings its output into the text, as its name in there says."""
    return _PROJECTS.search(name) is not None


def encode_in_forward(model: PreTrainedModel) -> None:
    """Has `generate` run towers in the model's forward, which all ranks enter, and not before it.

    There ranks without an image would not come to the towers' collectives.
    """
    model._supports_mm_encoder_outputs = lambda: False  # type: ignore[assignment]


def wrap_deepstack(decoder: nn.Module, wrap: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    """Wraps what a decoder calls between layers to add a tower's features (DeepStack), if it has that.

    Args:
        decoder: The module around decoder layers.
        wrap: Is given its function, of hidden states ``[B, S, H]``, a mask of places ``[B, S]`` and features.
    """
    own = getattr(decoder, "_deepstack_process", None)
    if own is not None:
        decoder._deepstack_process = wrap(own)  # type: ignore[assignment]


def attention_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """What mixes the tokens of a sequence in decoder layers, by name: what takes positions, masks or a cache.

    A family may declare a whole model to be one block (Qwen3-Omni's predictor of codes); its layers are no mixers.
    """
    layers = set(decoder_layers(model))
    inside = {child for layer in layers for child in layer.modules()} - layers
    return {
        name: child
        for name, child in model.named_modules()
        if child in inside
        and not isinstance(child, PreTrainedModel | GradientCheckpointingLayer)
        and set(inspect.signature(child.forward).parameters) & _OF_SEQUENCES
    }


def routers(models: Iterable[nn.Module]) -> set[nn.Module]:
    """The routers of ``models``: what they declare to give router logits, if it has no experts.

    Where a family declares none for some experts (those of another kind of router, or of a tower), it is what stands
    beside them and has a row of weights per expert. Of a router inside a wrapper of PEFT it is the wrapper: that is
    what the model calls, and what it calls itself (the router, a trained copy of it) may change.
    """
    models = list(models)
    inner = [child for model in models for child in model.modules() if isinstance(child, PreTrainedModel)]
    recorders = [(child._can_record_outputs or {}).get("router_logits") for child in inner]
    classes = tuple({getattr(recorder, "target_class", recorder) for recorder in recorders if recorder is not None})
    experts = {child for model in models for child in experts_modules(model).values()}
    declared = {child for model in models for child in model.modules() if isinstance(child, classes)}
    found = {child for child in declared if experts.isdisjoint(child.modules())}
    found |= {gate for model in models for gate in _gates(model, found)}
    wrappers = [child for model in models for child in model.modules() if inside_wrapper(child) in found]
    held = {child for wrapper in wrappers for child in wrapper.modules() if child is not wrapper}
    return (found - held) | (set(wrappers) - held)


def is_peft(module: nn.Module) -> bool:
    """Whether the class of a module, or one that it derives from, is PEFT's."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__)


def inside_wrapper(module: nn.Module) -> nn.Module:
    """What wrappers of PEFT (adapters, ``modules_to_save``) are around; the module itself if it is no wrapper."""
    while is_peft(module):
        children = dict(module.named_children())
        inner = children.get("base_layer", children.get("original_module"))
        if inner is None:
            break
        module = inner
    return module


def _gates(model: nn.Module, found: set[nn.Module]) -> Iterator[nn.Module]:
    for name, experts in experts_modules(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        if found.isdisjoint(block.modules()):
            number = next(experts.parameters()).shape[0]
            for child in block.children():
                plain = inside_wrapper(child)
                weights = [param.shape[0] for param in plain.parameters(recurse=False) if param.ndim == 2]
                if child is not experts and weights == [number]:
                    yield plain


def moe_blocks(model: PreTrainedModel) -> dict[str, tuple[nn.Module, nn.Module | None, nn.Module]]:
    """Every experts module of a model by its name, with its router, if it has one, and the module around both.

    The outputs of all families' routers are logits, ``[T, E]`` or with more dimensions in front, then routing weights
    and ids.
    """
    known, found = routers([model]), {}
    for name, experts in experts_modules(model).items():
        around, router = name, None
        while around and router is None:
            around = around.rpartition(".")[0]
            router = next((child for child in model.get_submodule(around).modules() if child in known), None)
        block = model.get_submodule(around if router is not None else name.rpartition(".")[0])
        found[name] = experts, router, block
    return found


def refuse_own_checkpointing(model: nn.Module, reason: str) -> None:
    """Makes turning on the activation checkpointing of transformers a ValueError."""

    # transformers reads the names of its parameters.
    def refuse(enable: bool = True, gradient_checkpointing_func: object = None, every_n_layers: int = 1) -> None:
        if enable:
            raise ValueError(reason)

    for child in model.modules():
        if isinstance(child, PreTrainedModel):
            child._set_gradient_checkpointing = refuse  # type: ignore[method-assign]


def keep_recording(model: PreTrainedModel) -> None:
    """Has transformers find what a model can record (hidden states) by the class that FSDP2 has put in its place."""
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs


def tied(model: PreTrainedModel) -> bool:
    """Whether the input embedding and the output head are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def shares_parameters(module: nn.Module, model: nn.Module) -> bool:
    """Whether ``model`` has a parameter of its submodule ``module`` at another place too, as that of tied weights.

    More than the two weights may be tied: peft's wrappers keep what they wrap beside what they train.
    """
    inside = set(module.modules())
    others = {p for child in model.modules() if child not in inside for p in child.parameters(recurse=False)}
    return any(param in others for param in module.parameters())
