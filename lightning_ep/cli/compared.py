"""A model on a layout beside the same model on one process: transformers' own code, the same weights and tokens."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import piece_of, shard_sequence
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.shards import local_region, local_tensor
from lightning_ep.hub.initialize import assign, materialize
from lightning_ep.hub.meta_models import from_config
from lightning_ep.layout import Meshes, ParallelLayout
from lightning_ep.moe.expert_parallel import expert_plan
from lightning_ep.parallelize import shard

SEED = 0
_SIZES = ("vocab_size", "moe_intermediate_size", "intermediate_size", "shared_expert_intermediate_size")
_ENOUGH_LAYERS = 4  # more of the same would only take longer
# Kept for each parameter in fp32: weights and gradients of the one process, and this rank's part of the other's.
_COPIES = 4 * 4


@dataclass(frozen=True)
class OneProcess:
    """What transformers' own code makes of all batches on one process, in fp32.

    Attributes:
        model: With the gradients of the mean loss of all batches.
        tokens_DS: The batches, one of every group of ranks that share one.
        logits_1SV: Of this rank's batch.
        chosen_LE: How often each expert of each layer was chosen.
    """

    model: PreTrainedModel
    tokens_DS: Tensor
    logits_1SV: Tensor
    chosen_LE: Tensor


@dataclass(frozen=True)
class Comparison:
    """What differs between the layout and one process, over all ranks.

    Attributes:
        logits: Norm of the difference of logits over the norm of one process's.
        gradients: The same of all gradients together.
        gradient: The same of the parameter's gradient that differs most.
        parameter: Its name.
        expert_norm: Norm of the gradients of all experts on the layout.
        expected_norm: The same on one process.
        moved: Share of the routers' choices that fell on other experts than on one process.
        num_local_experts: Experts of a layer that this rank holds.
    """

    logits: float
    gradients: float
    gradient: float
    parameter: str
    expert_norm: float
    expected_norm: float
    moved: float
    num_local_experts: int


def cut_to_fit(config: PreTrainedConfig, bytes_free: float) -> tuple[PreTrainedConfig, str]:
    """A configuration in fp32 whose comparison fits into a rank's memory, and what was cut.

    Of the layers four are kept at most, and fewer where they do not fit. Where two are too many, vocabulary and MLPs
    become narrower; heads, experts and the hidden size, which layouts have rules about, stay.

    Args:
        config: Of the whole model, which is not changed.
        bytes_free: Of the rank that has least.

    Raises:
        ValueError: If the narrowest does not fit.
    """
    whole = config.num_hidden_layers
    least = min(2, whole)
    tried = [(layers, 0) for layers in range(min(_ENOUGH_LAYERS, whole), least - 1, -1)]
    for layers, halvings in [*tried, *((least, halvings) for halvings in range(1, 7))]:
        cut = _cut(config, layers, halvings)
        needed = _COPIES * sum(param.numel() for param in from_config(cut).parameters())
        if needed <= bytes_free:
            said = [f"{layers} of {whole} layers"] if layers < whole else []
            sizes = ", ".join(f"{name}={getattr(cut, name)}" for name in _SIZES if getattr(cut, name, None))
            return cut, "; ".join([*said, *([f"narrowed to {sizes}"] if halvings else [])])
    raise ValueError(
        f"a comparison with one process needs {needed / 2**30:.1f} GiB on every rank, even of {least} layers with MLPs "
        f"of 1/{2**halvings} of their width, and {bytes_free / 2**30:.1f} are free. Use fewer processes per node."
    )


def _cut(config: PreTrainedConfig, layers: int, halvings: int) -> PreTrainedConfig:
    """A configuration of fewer layers, with vocabulary and MLPs of a part of their width."""
    values = {**config.to_dict(), "num_hidden_layers": layers, "dtype": "float32", "use_cache": False}
    for name in ("layer_types", "mlp_layer_types"):
        if values.get(name):
            values[name] = values[name][:layers]
    if (values.get("first_k_dense_replace") or 0) >= layers:
        values["first_k_dense_replace"] = layers - 1
    for name in _SIZES:
        if halvings and values.get(name):
            values[name] = max(values[name] >> halvings, 1)
    return type(config).from_dict({**values, "pad_token_id": None})  # which may lie beyond a narrower vocabulary


def on_one_process(config: PreTrainedConfig, layout: ParallelLayout, device: torch.device, sequence: int) -> OneProcess:
    """Transformers' model on this process alone, drawn on its device by transformers' own rules, and one backward.

    Args:
        config: Of the model, in fp32.
        layout: What it will be compared with: every group of ranks that share a batch has one sequence.
        device: This rank's. All ranks must have devices that draw alike.
        sequence: Tokens per sequence.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        with device:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        tokens_DS = torch.randint(0, config.vocab_size, (layout.data_world_size, sequence), device=device)
    model.set_experts_implementation("grouped_mm")  # eager makes gradients of the size of all experts for each of them
    experts = _num_experts(model)
    own, logits, chosen = layout.place(dist.get_rank()).data, torch.empty(0), _count_choices(model, experts, device)
    for index, tokens_S in enumerate(tokens_DS):
        output = model(input_ids=tokens_S[None], labels=tokens_S[None], use_cache=False)
        (output.loss / len(tokens_DS)).backward()
        if index == own:
            logits = output.logits.detach()
    return OneProcess(model, tokens_DS, logits, chosen)


def compare(
    alone: OneProcess,
    config: PreTrainedConfig,
    layout: ParallelLayout,
    meshes: Meshes,
    device: torch.device,
    policy: MixedPrecisionPolicy,
) -> Comparison:
    """Runs a forward and a backward on the layout with the weights and batches of one process; all ranks must call it.

    Args:
        alone: What it is compared with.
        config: As there.
        layout: The layout.
        meshes: Its meshes.
        device: This rank's.
        policy: What is computed and reduced in which dtype.
    """
    model = from_config(copy.deepcopy(config))  # which it changes
    shard(model, layout, meshes, device, expert_plan(model), policy)
    with torch.no_grad():
        whole = dict(alone.model.named_parameters())
        # Copies: what a rank holds is updated nowhere here, but two models must not share it.
        parts = {id(x): local_region(x).of(whole[name]).clone() for name, x in model.named_parameters()}
    assign(model, parts)
    materialize(model, device, SEED)  # buffers
    place, chosen = layout.place(dist.get_rank()), _count_choices(model, _num_experts(alone.model), device)
    tokens_1S = alone.tokens_DS[place.data : place.data + 1]
    output = model(**shard_sequence({"input_ids": tokens_1S, "labels": tokens_1S}, meshes.cp), use_cache=False)
    (output.loss / layout.loss_world_size).backward()
    start, length = piece_of(tokens_1S.shape[1], layout.cp, place.cp)
    expected = alone.logits_1SV[:, start : start + length]
    differences = {"": _squares(output.logits.detach()[:, : expected.shape[1]], expected)}
    for name, param in model.named_parameters():
        differences[name] = _gradient_squares(param, whole[name])
    moved = _moved(chosen, alone.chosen_LE)
    return _summary(differences, set(expert_plan(alone.model)), moved, _num_experts(model))


def _num_experts(model: PreTrainedModel) -> int:
    """Of a layer, as far as this rank holds them."""
    return next(iter(adapter.experts_modules(model).values())).num_experts  # type: ignore[return-value]


def _count_choices(model: PreTrainedModel, num_experts: int, device: torch.device) -> Tensor:
    """How often each expert of each layer is chosen from now on: ``[L, E]``, which is counted up."""
    modules = list(adapter.experts_modules(model).values())
    counts_LE = torch.zeros(len(modules), num_experts, dtype=torch.int64, device=device)

    def count(layer: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_TK = args[1] if len(args) > 1 else kwargs["top_k_index"]
        counts_LE[layer] += torch.bincount(ids_TK.flatten(), minlength=num_experts)

    for layer, module in enumerate(modules):
        module.register_forward_pre_hook(partial(count, layer), with_kwargs=True)
    return counts_LE


def _moved(found_LE: Tensor, expected_LE: Tensor) -> float:
    """Share of choices of all ranks that are others. What was added to make sequences even chooses experts, too."""
    dist.all_reduce(found_LE)
    added = max(int(found_LE.sum() - expected_LE.sum()), 0)
    return (int((found_LE - expected_LE).abs().sum()) - added) / 2 / int(expected_LE.sum())


def _squares(found: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """Sums of squares: of the difference, of what is expected, of what was found."""
    found, expected = found.double(), expected.double()
    return tuple((x * x).sum().item() for x in (found - expected, expected, found))  # type: ignore[return-value]


def _gradient_squares(param: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """Of this rank's part of a gradient; where nothing came to a parameter its gradient is zero."""
    region = local_region(param)
    wanted = region.of(expected.grad if expected.grad is not None else torch.zeros_like(expected))
    found = local_tensor(param.grad) if param.grad is not None else torch.zeros_like(wanted)
    return _squares(found.reshape(wanted.shape), wanted)


def _summary(
    differences: dict[str, tuple[float, float, float]], experts: set[str], moved: float, num_local_experts: int
) -> Comparison:
    """Over all ranks; what several hold alike counts as often on both sides."""
    ranks = from_all_ranks(differences)
    sums = {name: _added([rank[name] for rank in ranks]) for name in differences}

    def error(wrong: float, expected: float, _: float) -> float:
        found = (wrong / expected) ** 0.5 if expected else wrong**0.5
        return found if math.isfinite(found) else math.inf  # NaN would be less than any bound, and more than none

    gradients = {name: found for name, found in sums.items() if name}
    worst = max(gradients, key=lambda name: error(*gradients[name]))
    _, expected, found = _added(
        [one for name, one in gradients.items() if any(name.startswith(f"{path}.") for path in experts)]
    )
    return Comparison(
        error(*sums[""]),
        error(*_added(list(gradients.values()))),
        error(*gradients[worst]),
        worst,
        found**0.5,
        expected**0.5,
        moved,
        num_local_experts,
    )


def _added(squares: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    return tuple(map(sum, zip(*squares, strict=True)))  # type: ignore[return-value]
