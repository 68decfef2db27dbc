"""Backward begins at what a model, a layer or a module beside returns, also in an object of a user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_ep import ParallelLayout, parallelize
from tests.moe.test_own_plan import _decoder
from tests.ranks import assert_ranks_agree, device
from tests.reference import VOCAB, tiny_model
from tests.rows import wrong_gradients


@dataclass
class _Dataclass:
    values: Tensor


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda values: {"values": values},
    "dataclass": _Dataclass,
    "namespace": lambda values: SimpleNamespace(values=values),
    "namespace in a tuple": lambda values: (SimpleNamespace(values=values),),
}


def _values(output: Any) -> Tensor:
    if isinstance(output, tuple):
        (output,) = output
    values: Tensor = output["values"] if isinstance(output, dict) else output.values
    return values


def _returns(module: nn.Module, kind: str) -> None:
    own = module.forward
    module.forward = lambda *args: KINDS[kind](own(*args))


class _OfAModel(nn.Module):
    """The logits of a model of plain PyTorch, whose root holds its head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.decoder = _decoder()
        _returns(self.decoder, kind)

    def forward(self, ids: Tensor) -> Tensor:
        return _values(self.decoder(ids))


class _OfALayer(nn.Module):
    """What the first of a group of layers returns; backward does not come to the others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.decoder = _decoder()
        first, second = self.decoder.layers  # type: ignore[misc]
        _returns(first, kind)
        first.register_forward_hook(lambda module, args, output: self.found.append(output))
        second.register_forward_pre_hook(lambda module, args: (_values(args[0]), *args[1:]))

    def forward(self, ids: Tensor) -> Tensor:
        self.found: list[Any] = []
        self.decoder(ids)
        return _values(self.found.pop())


class _OfAHead(nn.Module):
    """What a head beside a transformers model says of hidden states through which no gradient goes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.decoder: Any = tiny_model()
        torch.manual_seed(3)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
        _returns(self.head, kind)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.decoder(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        return _values(self.head(hidden.detach()))


def _trains(of: type[nn.Module], kind: str) -> list[str]:
    world, plain, sharded = dist.get_world_size(), of(kind), of(kind)
    layout, experts = ParallelLayout(world, ep=world), {"layers.*.moe.experts": "experts"}
    if of is _OfAHead:
        parallelize(sharded, layout, device())
    else:
        parallelize(sharded.decoder, layout, device(), plan=experts)  # type: ignore[arg-type]
    ids = torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    for model, where in ((plain, torch.device("cpu")), (sharded, device())):
        model(ids.to(where)).square().mean().backward()
    if all(param.grad is None for param in sharded.parameters()):
        return ["nothing has a gradient"]
    return wrong_gradients(plain.named_parameters(), sharded.parameters(), 2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_one_process(kind: str) -> None:
    for of in (_OfAModel, _OfALayer, _OfAHead):
        assert_ranks_agree(2, _trains, of, kind)
