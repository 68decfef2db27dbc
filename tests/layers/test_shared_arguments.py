"""Layers that write into a dict what later ones read, as Gemma 4 shares keys and values, are recomputed as they ran."""

from __future__ import annotations

from collections import UserDict
from collections.abc import MutableMapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_ep.layers.recompute import checkpoint_layer


class _Layer(nn.Module):
    """Makes what is shared unless another layer has: a second run on the same dict would save fewer tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden: Tensor, shared: MutableMapping[str, Tensor]) -> Tensor:
        if "keys" not in shared:
            shared["keys"] = self.keys(hidden).sin()
        return self.out(hidden * shared["keys"]).sin()


def _gradients(layers: nn.ModuleList, shared: Any) -> list[Tensor | None]:
    hidden = torch.linspace(-1, 1, 12).view(3, 4)
    for layer in layers:
        hidden = layer(hidden, shared=shared)
    hidden.square().sum().backward()
    return [param.grad for param in layers.parameters()]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_layer_is_recomputed_on_the_dict_that_it_was_given(kind: Any) -> None:
    torch.manual_seed(0)
    plain = nn.ModuleList([_Layer(), _Layer(), _Layer()])
    layers = deepcopy(plain)
    for layer in layers:
        checkpoint_layer(layer, [], [], "full", compile=False)
    shared = kind()
    found, expected = _gradients(layers, shared), _gradients(plain, kind())
    assert list(shared) == ["keys"]
    assert (
        [grad is None for grad in found]
        == [grad is None for grad in expected]
        == [False] * 4 + [True, True, False, False] * 2
    )
    for grad, wanted in zip(found, expected, strict=True):
        assert grad is None or torch.equal(grad, wanted)
