"""An optimizer of before would train nothing: it is said, once the model is sharded."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_ep import ParallelLayout, parallelize
from tests.ranks import assert_ranks_agree, device
from tests.reference import tiny_model


def _said(early: bool) -> list[str]:
    model = tiny_model()
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.1) if early else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parallelize(model, ParallelLayout(2, ep=2), device())
    said = [str(one.message) for one in caught if "An optimizer has been made" in str(one.message)]
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1)  # as it should be
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.arange(8, device=device())[None], labels=torch.arange(8, device=device())[None]).loss.backward()
    optimizer.step()
    trains = any(not torch.equal(a.to_local(), b.to_local()) for a, b in zip(before, model.parameters(), strict=True))
    wrong = [] if trains == (not early) else [f"the optimizer {'trains' if trains else 'does not train'}"]
    if torch.distributed.get_rank() == 0 and len(said) != early:
        wrong.append(f"said {said}")
    return wrong


@pytest.mark.parametrize("early", [True, False])
def test_an_optimizer_of_before_is_warned_of(early: bool) -> None:
    assert_ranks_agree(2, _said, early)
