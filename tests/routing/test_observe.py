"""What is seen of routers is what they choose on one process, once, of tokens that are no padding, on every layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.context_parallel import shard_sequence
from lightning_ep.loss import sequence_log_probs, summed_loss, token_losses
from lightning_ep.ops.cross_entropy import shifted
from lightning_ep.routing import (
    BalancingLoss,
    BiasUpdates,
    Observation,
    Routing,
    RoutingCounts,
    Watched,
    router_losses,
    steer_routers,
    sum_over_ranks,
)
from lightning_ep.routing.steer import steerings
from tests.ranks import assert_ranks_agree, device, here, run_ranks
from tests.reference import batches, relative_error, tiny_model

NUM_EXPERTS, TOP_K = 8, 4


def _padded(data_ranks: int) -> list[dict[str, Tensor]]:
    """Two batches for every data rank, padded on the right, each differently."""
    data = batches(2 * data_ranks, 2, 11)
    for index, batch in enumerate(data):
        lengths = torch.tensor([[3 + index], [11 - index]])
        batch["attention_mask"] = (torch.arange(11)[None] < lengths).long()
    return data


def _reference(data: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Counts ``[L, E]`` and sums of router logits ``[L, E]``, from transformers' own outputs on one process."""
    model = tiny_model()
    counts_LE = torch.zeros(2, NUM_EXPERTS, dtype=torch.int64)
    logits_LE = torch.zeros(2, NUM_EXPERTS)
    for batch in data:
        counted_T = batch["attention_mask"].bool().flatten()
        output = model(**batch, output_router_logits=True, use_cache=False)
        for layer, logits_TE in enumerate(output.router_logits):
            counts_LE[layer] += logits_TE[counted_T].topk(TOP_K).indices.flatten().bincount(minlength=NUM_EXPERTS)
            logits_LE[layer] += logits_TE[counted_T].sum(0).detach()
    return counts_LE, logits_LE


def _seen(sizes: dict[str, int], options: dict[str, Any]) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    layout = ParallelLayout.resolve(sizes["ep"], "auto", world, world, 1, sizes.get("tp", 1), sizes.get("cp", 1))
    data = _padded(layout.data_world_size)
    counts_LE, logits_LE = _reference(data)
    model = tiny_model()
    meshes = parallelize(model, layout, device(), **options)
    counts, evaluated = RoutingCounts(model), RoutingCounts(model, training=False)
    sums_LE = torch.zeros(2, NUM_EXPERTS, device=device())

    def add_logits(routing: Routing) -> None:
        counted_T = routing.counted_T
        assert routing.logits_TE is not None
        rows_TE = routing.logits_TE.detach()
        sums_LE[routing.layer.index] += (rows_TE if counted_T is None else rows_TE * counted_T[:, None]).sum(0)

    observation = Observation(model, add_logits, logits="graph")
    for batch in data[2 * layout.data_rank(rank) :][:2]:
        inputs = shard_sequence(here(batch), meshes.cp)
        model(**inputs).loss.backward()
    observation.remove()
    with torch.no_grad():
        model(**inputs)
    wrong = []
    if not torch.equal(found := sum_over_ranks(counts.take()).cpu(), counts_LE):
        wrong.append(f"counts {found.tolist()} in place of {counts_LE.tolist()}")
    if not (error := relative_error(sum_over_ranks(sums_LE), logits_LE)) <= 1e-5:
        wrong.append(f"logits: {error:.1e}")
    if not 0 < (passed := int(sum_over_ranks(evaluated.take()).sum())) < counts_LE.sum():
        wrong.append(f"{passed} choices in the pass without a backward")
    return wrong


LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "fsdp": (2, {"ep": 1}, {}),
    "ep": (2, {"ep": 2}, {}),
    "selective": (2, {"ep": 2}, {"activation_checkpointing": "selective"}),
    "full": (2, {"ep": 2}, {"activation_checkpointing": "full"}),
    "tp": (2, {"ep": 2, "tp": 2}, {}),
    "cp": (2, {"ep": 2, "cp": 2}, {"activation_checkpointing": "full"}),
    "tp and cp": (4, {"ep": 4, "tp": 2, "cp": 2}, {}),
    "compiled": (2, {"ep": 2}, {"compile": True}),
    "compiled, full": (2, {"ep": 2}, {"compile": True, "activation_checkpointing": "full"}),
}
_MARKS = (pytest.mark.slow, pytest.mark.timeout(360))
_SLOW = ("compiled", "compiled, full", "tp and cp")


@pytest.mark.parametrize("name", [pytest.param(n, marks=_MARKS) if n in _SLOW else n for n in LAYOUTS])
def test_every_choice_is_seen_once_and_padding_is_not(name: str) -> None:
    world, sizes, options = LAYOUTS[name]
    assert_ranks_agree(world, _seen, sizes, options, timeout=300)


def _compiled(logits: Any) -> tuple[list[str], int]:
    """What is wrong with logits of compiled layers and gradients of a loss on them; how many graphs these have."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found: list[list[Tensor]] = []
    grads: list[list[Tensor]] = []
    for compile in (False, True):
        seen: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
            model = tiny_model(num_hidden_layers=3)
            parallelize(model, ParallelLayout.resolve(1, "auto", 1, 1), device(), compile=compile)
        Observation(model, lambda routing, seen=seen: seen.append(routing.logits_TE), logits=logits)
        for _ in range(2):
            seen.clear()
            model.zero_grad()
            loss = model(**{name: value.to(device()) for name, value in batches(1, 2)[0].items()}).loss
            if logits == "graph":
                loss = loss + torch.stack(seen).logsumexp(-1).square().mean()
            loss.backward()
        found.append([logits_TE.detach() for logits_TE in seen])
        grads.append([layer.mlp.gate.weight.grad for layer in model.model.layers])
        assert len(seen) == 3
        assert all(logits_TE.requires_grad == (logits == "graph") for logits_TE in seen)
    pairs = [*zip(*found, strict=True), *zip(*grads, strict=True)]
    wrong = [f"{number}: {error:.1e}" for number, pair in enumerate(pairs) if (error := relative_error(*pair)) > 1e-5]
    return wrong, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("logits", ["values", "graph"])
def test_logits_leave_compiled_layers_without_another_graph(logits: str) -> None:
    """One before the experts and one behind them, for all layers, and one of the norm, as where nobody looks."""
    assert run_ranks(1, _compiled, logits) == [([], 3)]


class _Cooler(nn.Module):
    """Does more with logits than the head, which a fused loss finds out in the middle of a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits / 2
        return output


class _Prompts(nn.Module):
    """Puts tokens in front, for which it wants labels, as prompt tuning does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        more = input_ids.new_full((len(input_ids), 2), 3)
        labels = None if labels is None else torch.cat([torch.full_like(more, -100), labels], 1)
        return self.inner(input_ids=torch.cat([more, input_ids], 1), labels=labels)


@pytest.mark.parametrize(
    ("around", "more", "loss_of"),
    [
        (_Cooler, 0, summed_loss),
        (_Prompts, 2, summed_loss),
        (_Cooler, 0, lambda module, targets, inputs, _: sequence_log_probs(module, targets, inputs)),
        (_Prompts, 2, token_losses),
    ],
)
def test_a_forward_that_is_made_again_is_seen_once(around: Any, more: int, loss_of: Any) -> None:
    model = tiny_model().eval()  # the mode in which `from_pretrained` gives models
    model.lm_head.weight.requires_grad_(loss_of in (summed_loss, token_losses))
    steer_routers(model, [BalancingLoss(1.0), BiasUpdates(0.01)])
    (steering,) = steerings(model)
    steering.begin()
    counts, watched = RoutingCounts(model), Watched(model)
    module, ids = around(model), batches(1, 2, 9)[0]["input_ids"]
    losses = []
    for _ in range(2):
        loss_of(module, shifted(ids), {"input_ids": ids}, ids)
        losses.append(router_losses(model, ids.device).detach())
    assert torch.equal(*losses)
    chosen = 2 * 2 * 2 * (9 + more) * TOP_K  # passes, layers, sequences
    assert counts.take().sum() == chosen
    assert watched.measures(watched.take()).load_ME.sum() > 0
    assert steering._window_LE is not None
    assert steering._window_LE.sum() == chosen
