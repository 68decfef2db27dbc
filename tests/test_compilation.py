"""Decoder layers are compiled in as few graphs as their experts allow, and torch's settings stay as they were."""

from __future__ import annotations

import functools

import pytest
import torch

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.compilation import compile_forward
from tests.distributed import device, run_ranks
from tests.reference import batches, tiny_model


def _graphs(mode: str) -> int:
    """Graphs of a model of three layers, which share them, for one number of tokens."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        model = tiny_model(num_hidden_layers=3)
        parallelize(
            model, ParallelLayout.resolve(1, "auto", 1, 1), device(), compile=True, activation_checkpointing=mode
        )
    for _ in range(2):
        batch = {name: value.to(device()) for name, value in batches(1, 2)[0].items()}
        model(**batch, use_cache=False).loss.backward()
    graphs: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return graphs


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_layer_is_one_graph_before_its_experts_and_one_behind(mode: str) -> None:
    assert run_ranks(1, _graphs, mode) == [2]


def test_the_setting_of_other_code_is_left_alone() -> None:
    before = torch._dynamo.config.nested_graph_breaks

    def fail(x: int) -> int:
        raise RuntimeError(str(torch._dynamo.config.nested_graph_breaks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        compiled = compile_forward(fail)
    with pytest.raises(RuntimeError, match="True"):
        compiled(1)
    assert torch._dynamo.config.nested_graph_breaks is before
