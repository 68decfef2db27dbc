"""Ranks that do things together all return, or all raise the same."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from lightning_ep.distributed.agreement import Ranks, agree
from tests.ranks import run_ranks


class _Problem(RuntimeError):
    pass


def _only(rank: int, error: Exception) -> int:
    if dist.get_rank() == rank:
        raise error
    return dist.get_rank()


def _message(function: Any) -> str:
    with pytest.raises(_Problem) as caught:
        function()
    return str(caught.value)


def _together(own_group: bool) -> list[Any]:
    ranks = Ranks(_Problem, timedelta(seconds=60) if own_group else None)
    assert ranks.together("counting", dist.get_rank) == [0, 1, 2]
    assert ranks.on_first("naming", lambda: f"rank {dist.get_rank()}") == "rank 0"
    assert ranks.alone("keeping", dist.get_rank) == dist.get_rank()
    turns: list[int] = []
    ranks.in_turns("taking turns", dist.get_rank() == 2, lambda: turns.append(1))
    return [
        turns,
        _message(lambda: ranks.together("writing", lambda: _only(1, OSError("disk full")))),
        _message(lambda: ranks.alone("reading", lambda: _only(2, _Problem("nothing there")))),
        _message(lambda: ranks.in_turns("opening", dist.get_rank() == 0, lambda: _only(0, KeyError("x")))),
        # All say the same, so it is said once.
        _message(lambda: ranks.together("looking", lambda: _only(dist.get_rank(), _Problem("no such thing")))),
    ]


@pytest.mark.parametrize("own_group", [False, True])
def test_all_return_or_all_raise(own_group: bool) -> None:
    expected = [
        [1],
        "writing: rank 1: OSError: disk full",
        "reading: rank 2: nothing there",
        "opening: rank 0: KeyError: 'x'",
        "looking: no such thing",
    ]
    assert run_ranks(3, _together, own_group) == [expected] * 3


def test_one_process_agrees_with_itself() -> None:
    assert agree(3, None, lambda problems: _Problem()) == [3]
    with pytest.raises(_Problem, match="0: broken"):
        agree(3, "broken", lambda problems: _Problem("; ".join(f"{rank}: {text}" for rank, text in problems.items())))
    with pytest.raises(_Problem, match=r"^opening: ValueError: no$") as caught:
        Ranks(_Problem).together("opening", lambda: _raise(ValueError("no")))
    assert isinstance(caught.value.__cause__, ValueError)


def _raise(error: Exception) -> None:
    raise error
