"""What `Watched` says of forwards that it does not look at."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_ep.routing import Watched
from tests.reference import tiny_model


def test_forwards_of_the_other_kind_alone_are_said_to_be_passed_over() -> None:
    model, ids = tiny_model(), torch.arange(8)[None]
    watched = Watched(model)
    with torch.no_grad():
        model(ids)
    with pytest.warns(UserWarning, match=r"forwards with no backward only.*Watched\(\.\.\., training=False\) looks"):
        watched.take()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        with torch.no_grad():  # a validation between steps is passed over as it should be
            model(ids)
        assert watched.measures(watched.take()).tokens_M.tolist() == [8] * len(watched.layers)
        watched.take()  # nothing has run
    other = Watched(model, training=False)
    model(ids)
    with pytest.warns(UserWarning, match=r"forwards with a backward only.*training=True\) looks"):
        other.take()
