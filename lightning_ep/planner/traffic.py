"""What travels: bytes that a rank sends over the links of its node and over the network, and how long they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_ep.planner.case import Case
from lightning_ep.planner.counts import expert_parameters, num_parameters, rows_sent
from lightning_ep.planner.devices import OF_LINK, OF_NETWORK, Device

_BF16 = 2


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends: to GPUs of its node, and to other nodes. Both go at once."""

    link: float = 0.0
    network: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.link + other.link, self.network + other.network)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.link * times, self.network * times)

    def ms(self, device: Device) -> float:
        """Milliseconds, by the slower of the two."""
        return 1e3 * max(self.link / (OF_LINK * device.link), self.network / (OF_NETWORK * device.network))


def exchange(case: Case) -> Traffic:
    """One of the exchanges of tokens in a layer: rows in bf16, as the busiest rank gets them."""
    if case.ep == 1:
        return Traffic()
    sent = case.tokens * case.skew * rows_sent(case.widths, case.ep) * _BF16 * case.widths.hidden
    beside = math.gcd(case.ep, case.node)  # ranks of a group in one node, the own among them
    away = sent * (case.ep - beside) / (case.ep - 1)
    return Traffic(sent - away, away)


def expert_gather(case: Case) -> Traffic:
    """One gather of the experts of a layer in bf16; reducing their gradients in fp32 sends twice as much."""
    return _ring(case, case.ep, case.fsdp, _BF16 * expert_parameters(case.widths) / case.ep)


def dense_gather(case: Case) -> Traffic:
    """One gather, in bf16, of everything that is no expert: embedding and head, and all layers."""
    experts = case.widths.expert_layers(case.layers) * expert_parameters(case.widths)
    held = (num_parameters(case.widths, case.layers) - experts) / case.tp
    return _ring(case, case.tp, case.shards // case.tp, _BF16 * held)


def copies_sum(case: Case) -> Traffic:
    """The all-reduce of all gradients of a rank, in fp32, over the copies of the model."""
    trained = 0 if case.lora_rank else num_parameters(case.widths, case.layers)
    return _ring(case, case.shards, case.replicate, 4 * trained / case.shards) * 2


def sequence_exchange(case: Case) -> Traffic:
    """Of a layer and direction under ``cp``: queries, keys and values to their heads' ranks, outputs back."""
    widths, cp = case.widths, case.cp
    repeats = 1 if widths.latent else cp // math.gcd(cp, widths.kv_heads)
    each = widths.query + widths.value + widths.keys_and_values * repeats
    return Traffic((cp - 1) / cp * case.tokens * each * _BF16)


def tensor_exchange(case: Case) -> Traffic:
    """Of an attention or dense MLP and direction under ``tp``: tokens gathered, outputs split again."""
    return Traffic(2 * (case.tp - 1) * case.tokens * case.widths.hidden * _BF16)


def _ring(case: Case, stride: int, size: int, gathered: float) -> Traffic:
    """What a rank of a group sends for a gather of so many bytes: all ranks of a ring send alike.

    A group has every ``stride``-th rank. Where it has ranks in several nodes, its ring leaves each node once, and the
    groups that have ranks in a node share the adapters of that node.
    """
    sent = (size - 1) / size * gathered
    if stride * size <= case.node:
        return Traffic(sent)
    groups = min(stride, case.node)
    return Traffic(0.0 if stride >= case.node else sent, sent * groups / case.node)
