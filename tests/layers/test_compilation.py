"""Decoder layers are compiled in as few graphs as their experts allow, and torch's settings stay as they were."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.layers.compilation import compile_forward
from tests.ranks import device, run_ranks
from tests.reference import batches, tiny_model


def _train(
    mode: str, compile: bool, hook_before: int | None, hooked: tuple[int, ...] = (), backend: str = "aot_eager"
) -> tuple[float, int]:
    """The last loss of a model of three layers, which share their graphs, and how many of these there were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        model, layout = tiny_model(num_hidden_layers=3), ParallelLayout.resolve(1, "auto", 1, 1)
        parallelize(model, layout, device(), compile=compile, activation_checkpointing=mode)
    for step in range(2):
        for index in hooked if step == hook_before else ():
            # One of its own for every layer: a recorder, say.
            model.model.layers[index].mlp.register_forward_hook(lambda *args, by=2 + index: by * args[-1])
        # With hooks another length, for which the layers are compiled once more.
        length = 8 + step * (hook_before is not None)
        batch = {name: value[:, :length].to(device()) for name, value in batches(1, 2)[0].items()}
        loss = model(**batch).loss
        loss.backward()
    return loss.item(), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_layer_is_one_graph_before_its_experts_and_one_behind(mode: str) -> None:
    ((_, graphs),) = run_ranks(1, _train, mode, True, None)
    assert graphs == 3  # and one of the norm behind all layers


@pytest.mark.parametrize(
    ("hooked", "hook_before", "mode", "backend"),
    [
        # Dynamo alone decides whose hooks run: with "eager" its graphs run as they are, in a third of the time.
        ((1,), 1, "none", "eager"),  # layers that share graphs until one of them differs
        ((0, 1, 2), 0, "full", "eager"),
        *(
            pytest.param(*case, "aot_eager", marks=pytest.mark.slow)
            for case in itertools.product([(0, 1, 2), (1,)], [0, 1], ["none", "full"])
        ),
    ],
)
def test_hooks_inside_a_layer_run(mode: str, hook_before: int, hooked: tuple[int, ...], backend: str) -> None:
    ((loss, _),) = run_ranks(1, _train, mode, True, hook_before, hooked, backend)
    ((eager, _),) = run_ranks(1, _train, mode, False, hook_before, hooked)
    ((without, _),) = run_ranks(1, _train, mode, False, None)
    assert loss == pytest.approx(eager, rel=1e-5)
    assert loss != pytest.approx(without, rel=1e-3)


def test_the_settings_of_other_code_are_left_alone() -> None:
    """Those that a layer is compiled with are torch's own again after it, also where it raises."""
    inside = {"nested_graph_breaks": True, "skip_nnmodule_hook_guards": False}

    class Fails(nn.Module):
        def forward(self, x: int) -> int:
            raise RuntimeError(str(changed()))

    def changed() -> dict[str, Any]:
        now = torch._dynamo.config.get_config_copy()
        return {name: now[name] for name in before if now[name] != before[name]}

    before = torch._dynamo.config.get_config_copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        compiled = compile_forward(Fails())
    with pytest.raises(RuntimeError) as raised:
        compiled(1)
    assert str(raised.value) == str({name: inside[name] for name in before if name in inside})
    assert changed() == {}
