"""The planner's bytes against those that two ranks sent through their collectives, and its parameters of a rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_ep import ParallelLayout, from_config, parallelize, shard_sequence
from lightning_ep.distributed.shards import local_tensor
from lightning_ep.planner import Case, read_widths
from lightning_ep.planner.counts import local_parameters
from lightning_ep.planner.traffic import dense_gather, exchange, expert_gather, sequence_exchange, tensor_exchange
from tests.ranks import device, run_ranks
from tests.reference import tiny_config

SEQUENCE = 64
CONFIG = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 64}


class _Sent(TorchDispatchMode):
    """Bytes that this rank sends to the other of two, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func).split(".")[1] if func.namespace in ("c10d", "_c10d_functional") else ""
        kind = "tensor parallelism, " if func.namespace == "_c10d_functional" else ""
        if "gather" in name or "reduce_scatter" in name:
            # Half of what is gathered, or of what is reduced, is the other's.
            tensors = [x for x in args[:2] if isinstance(x, torch.Tensor)]
            tensors += [out] if isinstance(out, torch.Tensor) else []
            found = max((x.numel() for x in tensors if x.is_floating_point()), default=0)  # counts of tokens are few
            self.bytes[kind + name.strip("_")] += found // 2 * 4
        elif "alltoall" in name:  # counts of rows too, which are few
            other, splits = 1 - dist.get_rank(), args[4]
            rows = splits[other] if splits else args[1].shape[0] // 2
            self.bytes["exchange"] += rows * args[1][:1].numel() * args[1].element_size()
        return out


def _step(sizes: dict[str, int]) -> tuple[dict[str, int], int, int]:
    """Bytes of a step on two ranks, and this rank's parameters of experts and all others."""
    config = tiny_config(**CONFIG)
    model = from_config(config)
    layout = ParallelLayout(2, **sizes)
    meshes = parallelize(model, layout, device())
    tokens = torch.randint(
        0, 64, (1, SEQUENCE), generator=torch.Generator().manual_seed(layout.data_rank(dist.get_rank()))
    )
    batch = shard_sequence({"input_ids": tokens.to(device()), "labels": tokens.to(device())}, meshes.cp)
    with _Sent() as sent:
        model(**batch, use_cache=False).loss.backward()
    held = {name: local_tensor(param).numel() for name, param in model.named_parameters()}
    experts = sum(count for name, count in held.items() if ".experts." in name)
    return dict(sent.bytes), experts, sum(held.values()) - experts


def _case(**sizes: int) -> Case:
    return Case(*read_widths(tiny_config(**CONFIG).to_dict()), 1, SEQUENCE, 2, **sizes)


@pytest.mark.parametrize("ep", [1, 2])
def test_tokens_and_weights_travel_as_estimated(ep: int) -> None:
    results = run_ranks(2, _step, {"ep": ep, "fsdp": 2 // ep})
    case = _case(ep=ep)
    sent = sum((Counter(found) for found, _, _ in results), Counter())
    # fp32 here, twice what is estimated in bf16. Rows are packed with ids and weights of 4 experts on their first way.
    tokens = 2 * 2 * 4 * 3 * exchange(case).link
    assert sent["exchange"] == pytest.approx(tokens * (1 + 8 / 256 / 4), rel=0.05)
    gathered = 2 * 2 * (3 * expert_gather(case).link + dense_gather(case).link)  # once, of both ranks
    reduced = gathered
    found = sum(bytes_ for name, bytes_ in sent.items() if "gather" in name)
    assert gathered < found <= 2 * gathered  # in backward again, but for what the root keeps
    assert sum(bytes_ for name, bytes_ in sent.items() if "reduce_scatter" in name) == pytest.approx(reduced, rel=0.01)
    for _, experts, others in results:
        assert (experts, others) == (pytest.approx(local_parameters(case)[0]), pytest.approx(local_parameters(case)[1]))


def test_sequences_travel_as_estimated() -> None:
    results = run_ranks(2, _step, {"ep": 1, "fsdp": 2, "cp": 2})
    for found, *_ in results:
        assert found["exchange"] == pytest.approx(2 * 2 * 3 * sequence_exchange(_case(cp=2)).link)


def test_activations_of_tensor_parallelism_travel_as_estimated() -> None:
    # Half of the embedding's and the logits' gathers too, there and back, which are not estimated.
    beside = 2 * SEQUENCE * (256 + 64) * 4 // 2
    for found, *_ in run_ranks(2, _step, {"ep": 1, "fsdp": 2, "tp": 2}):
        sent = sum(bytes_ for name, bytes_ in found.items() if name.startswith("tensor parallelism"))
        assert sent == 2 * 2 * 3 * tensor_exchange(_case(tp=2)).link + beside
