"""A model on a layout beside the same model on one process: transformers' own code, the same weights and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import shard_sequence
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.distributed.shards import local_region, local_tensor
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.meta_models import from_config
from lightning_ep.layout import Meshes, ParallelLayout
from lightning_ep.moe.expert_parallel import expert_plan

SEED = 0
_SIZES = ("vocab_size", "moe_intermediate_size", "intermediate_size", "shared_expert_intermediate_size")
_ENOUGH_LAYERS = 4  # more of the same would only take longer: every rank draws the weights of all experts
# Kept for each parameter in fp32: weights and gradients of the one process, and this rank's part of the other's.
_COPIES = 4 * 4


@dataclass(frozen=True)
class Comparison:
    """What differs between the layout and one process, over all ranks.

    Attributes:
        logits: Norm of the difference of logits over the norm of one process's.
        gradient: The same of the parameter's gradient that differs most.
        parameter: Its name.
        expert_norm: Norm of the gradients of all experts on the layout.
        expected_norm: The same on one process.
    """

    logits: float
    gradient: float
    parameter: str
    expert_norm: float
    expected_norm: float


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


def compare(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    layout: ParallelLayout,
    meshes: Meshes,
    device: torch.device,
    sequence: int,
) -> Comparison:
    """Runs a forward and a backward on the layout, and on this process alone; every rank must call it.

    Args:
        model: Made of ``config``, parallelized on ``layout`` with fp32 weights drawn from the seed 0.
        config: What the model was made of.
        layout: Its layout.
        meshes: Its meshes.
        device: This rank's.
        sequence: Tokens per sequence; every group of ranks that share a batch has one.
    """
    generator = torch.Generator().manual_seed(SEED)
    tokens_DS = torch.randint(0, config.vocab_size, (layout.data_world_size, sequence), generator=generator).to(device)
    own = layout.data_rank(dist.get_rank())
    batch: dict[str, Any] = {"input_ids": tokens_DS[own : own + 1], "labels": tokens_DS[own : own + 1]}
    output = model(**shard_sequence(batch, meshes.cp), use_cache=False)
    (output.loss / layout.loss_world_size).backward()
    alone, logits_1SV = _on_one_process(config, tokens_DS, own, device)
    length = output.logits.shape[1]
    start = 0 if meshes.cp is None else meshes.cp.get_local_rank() * length
    differences = {"": _squares(output.logits.detach()[:, : sequence - start], logits_1SV[:, start : start + length])}
    expected = dict(alone.named_parameters())
    for name, param in model.named_parameters():
        differences[name] = _gradient_squares(param, expected[name])
    return _summary(differences, set(expert_plan(alone)))


def _on_one_process(
    config: PreTrainedConfig, tokens_DS: Tensor, own: int, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """Transformers' model with the gradients of the mean loss of all batches, and the logits of one of them."""
    model = from_config(config)
    materialize(model, device, SEED)
    model.set_experts_implementation("eager")
    logits = torch.empty(0)
    for index, tokens_S in enumerate(tokens_DS):
        output = model(input_ids=tokens_S[None], labels=tokens_S[None], use_cache=False)
        (output.loss / len(tokens_DS)).backward()
        if index == own:
            logits = output.logits.detach()
    return model, logits


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


def _summary(differences: dict[str, tuple[float, float, float]], experts: set[str]) -> Comparison:
    """Over all ranks; what several hold alike counts as often on both sides."""
    ranks = from_all_ranks(differences)
    sums = {name: [sum(rank[name][i] for rank in ranks) for i in range(3)] for name in differences}

    def error(name: str) -> float:
        wrong, expected, _ = sums[name]
        return (wrong / expected) ** 0.5 if expected else wrong**0.5

    worst = max((name for name in sums if name), key=error)
    of_experts = [sums[name] for name in sums if name and any(name.startswith(f"{path}.") for path in experts)]
    expected, found = (sum(one[i] for one in of_experts) ** 0.5 for i in (1, 2))
    return Comparison(error(""), error(worst), worst, found, expected)


def experts_of(model: PreTrainedModel) -> int:
    """Experts of a layer that this rank holds."""
    return next(iter(adapter.experts_modules(model).values())).num_experts  # type: ignore[return-value]
