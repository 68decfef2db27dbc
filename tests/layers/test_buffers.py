"""Layers whose forward writes into their own buffers are recomputed on what these were, and write into them once."""

from __future__ import annotations

import functools
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lightning_ep.layers.recompute import checkpoint_layer


class _Assigns(nn.Module):
    """A running mean in a new tensor for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, hidden: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * hidden.detach().mean(0)
        return hidden * (1 + self.mean)


class _Layer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out(self.inner(hidden)).sin()


@pytest.mark.parametrize(
    "inner", [lambda: nn.BatchNorm1d(4), lambda: spectral_norm(nn.Linear(4, 4)), _Assigns], ids=["batch", "norm", "own"]
)
@pytest.mark.parametrize("compile", [False, True])
def test_a_layer_writes_into_its_buffers_once(inner: type[nn.Module], compile: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(*(_Layer(inner()) for _ in range(2)))
    layers, before = deepcopy(plain), deepcopy(plain.state_dict())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        for layer in layers:
            checkpoint_layer(layer, [], [], "full", compile=compile)
    for model in (plain, layers):
        for step in range(2):
            first, second = (
                model(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))),
                model(torch.ones(3, 4)),
            )
            second.square().sum().backward()  # which comes to the layers in another order than forward did
            first.square().sum().backward()
    found, expected = layers.state_dict(), plain.state_dict()
    assert any(not torch.equal(buffer, before[name]) for name, buffer in plain.named_buffers())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
    for (name, param), wanted in zip(layers.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(param.grad, wanted.grad, msg=name)
