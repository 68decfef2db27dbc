"""Stochastic rounding: two neighbours, as likely as they are near; what round-to-nearest loses stays in the mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import lightning_ep
from lightning_ep.ops.adamw import Rule, Update, adamw_rounded_
from lightning_ep.ops.rounding import Elements, random_bits_twin, round_stochastically_twin

_STEP = torch.tensor(1.0)


def _elements(count: int, key: int = 7, start: int = 0) -> Elements:
    return Elements(key, start, max(1, count), count)


def test_every_fraction_rounds_up_as_often_as_it_says() -> None:
    """For some of the 65,536 fractions between two neighbours, all of the 65,536 random numbers."""
    low = torch.tensor([1.5, -1.5, 3e-39, 0.0]).bfloat16()
    fractions, numbers = torch.tensor([0, 1, 2, 777, 32_767, 32_768, 50_001, 65_535]), torch.arange(65_536)
    for below in low:
        exact = (below.float().view(torch.int32) + fractions.int()).view(torch.float32)
        above = (below.float().view(torch.int32) + 65_536).view(torch.float32).bfloat16()
        x, bits = torch.broadcast_tensors(exact[:, None], numbers[None])
        found = round_stochastically_twin(x.contiguous(), bits.contiguous())
        assert ((found == below) | (found == above)).all()
        assert torch.equal((found == above).sum(1), fractions)


def test_what_has_no_neighbour_stays() -> None:
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -2.5])
    for bits in (0, 1, 65_535):
        found = round_stochastically_twin(special, torch.full((6,), bits))
        assert torch.equal(found, special.bfloat16())
        assert torch.equal(found.signbit(), special.signbit())


@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1], ids=["as GPUs write it", "negative"])
def test_nan_stays_nan(bits: int) -> None:
    """A carry would make zero of it."""
    nan = torch.full((64,), bits, dtype=torch.int32).view(torch.float32)
    for name in ("param", "grad", "exp_avg", "exp_avg_sq"):
        update = Update(*(torch.ones(64).bfloat16() for _ in range(4)), _STEP)._replace(**{name: nan})
        adamw_rounded_(update, Rule(1e-3, (0.9, 0.999), 1e-8, 0.0), None, _elements(64))
        assert update.param.isnan().all()
        assert all(update.exp_avg.isnan() == (name in ("grad", "exp_avg")))
        assert all(update.exp_avg_sq.isnan() == (name in ("grad", "exp_avg_sq")))


def test_bits_are_those_of_the_published_functions() -> None:
    """SplitMix64 for the stream of a step, Wellons' hash for an element, in whole numbers of Python."""

    def splitmix64(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        return state ^ (state >> 31)

    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first number of seed 0"
    key, start, step = 2**63 - 5, 2**40 + 2**32 - 4, 1000
    stream = splitmix64((key + step * 0x9E3779B97F4A7C15) % 2**64)
    found = random_bits_twin(Elements(key, start, 3, 10), 9, torch.tensor(float(step)))
    for i in range(9):
        x = (start + i // 3 * 10 + i % 3 + stream) % 2**32
        x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32
        x = (x ^ (x >> 11) ^ (stream >> 32)) * 0xAC4C1B51 % 2**32
        x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
        x ^= x >> 14
        assert [number[i].item() for number in found] == [x % 2**16, x >> 16, x * 0x9E3779B1 % 2**32 >> 16]


def _chi_squared(counts: Tensor) -> float:
    """In standard deviations from its mean, for counts that should all be the same."""
    expected, free = counts.sum() / len(counts), len(counts) - 1
    return (((counts - expected).square() / expected).sum() - free).item() / math.sqrt(2 * free)


def test_random_bits_are_uniform_and_pairs_of_them_independent() -> None:
    """Of the three numbers of an element, of neighbours, of steps and of parameters."""
    count = 2**18
    kinds = ((1, 1.0), (1, 2.0), (2, 1.0))
    streams = [random_bits_twin(_elements(count, key), count, torch.tensor(step)) for key, step in kinds]
    numbers = [number for stream in streams for number in stream]
    shifted = [number.roll(by) for number in streams[0] for by in (1, 16, 768, 2048)]
    for number in numbers:
        assert abs(_chi_squared(torch.bincount(number >> 6, minlength=1024).double())) < 5
        assert abs(_chi_squared(torch.bincount(number & 1023, minlength=1024).double())) < 5
    for first, second in itertools.combinations([*numbers, *shifted], 2):  # hashes of two rounds fail at 2,048
        pairs = (first >> 11) * 32 + (second >> 11)
        assert abs(_chi_squared(torch.bincount(pairs, minlength=1024).double())) < 5


def test_the_mean_of_rounding_is_what_was_rounded() -> None:
    """Within 1e-3 of an update that round-to-nearest loses: 1/500 of the distance of two neighbours, in 50 steps."""
    count, update = 2**18, torch.tensor(2.0**-7 / 500)
    weights = torch.ones(count).bfloat16()
    assert weights[0].float() + update == 1 + update
    assert (weights.float() + update).bfloat16()[0] == 1
    for step in range(50):
        bits, _, _ = random_bits_twin(_elements(count), count, torch.tensor(float(step)))
        weights = round_stochastically_twin(weights.float() + update, bits)
    moved = (weights.double() - 1).mean().item()
    assert moved == pytest.approx(50 * update.item(), abs=1e-3 * 2.0**-7)


def _after_gradients_vanish(steps: int, rounds: bool) -> Tensor:
    """Second moments of 1, by the optimizer, after so many steps without a gradient."""
    param = torch.ones(4096).bfloat16().requires_grad_()
    optimizer = lightning_ep.AdamW([param], lr=1e-5, betas=(0.9, 0.999), stochastic_rounding=rounds)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.state[param]["exp_avg_sq"].fill_(1.0)
    for _ in range(steps):
        optimizer.step()
    return optimizer.state[param]["exp_avg_sq"].double()


def test_second_moments_in_bf16_decay_only_if_rounded_stochastically() -> None:
    assert (_after_gradients_vanish(300, rounds=False) == 1).all(), "0.999 of it is nearest to itself"
    found = _after_gradients_vanish(300, rounds=True)
    assert found.mean().item() == pytest.approx(0.999**300, rel=5e-3)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weights_follow_fp32s_in_the_mean(decay: float) -> None:
    """200 steps of 1e-5: fp32 masters move, bf16 ones rounded to the nearest do not, stochastically rounded ones do."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 + 0.02 * torch.rand(20_000, generator=generator)).bfloat16()
    moved = {}
    for name, dtype, rounds in (
        ("fp32", torch.float32, False),
        ("nearest", torch.bfloat16, False),
        ("ours", torch.bfloat16, True),
    ):
        param = start.to(dtype, copy=True).requires_grad_()
        optimizer = lightning_ep.AdamW([param], lr=1e-6, weight_decay=decay, stochastic_rounding=rounds)
        for step in range(200):
            draw = torch.Generator().manual_seed(step)
            param.grad = (1 + 0.5 * torch.randn(start.shape, generator=draw)).to(dtype)
            optimizer.step()
        moved[name] = (param.detach().double() - start.double()).mean().item()
    assert moved["nearest"] == 0
    assert moved["ours"] == pytest.approx(moved["fp32"], rel=0.02)


def test_what_is_fp32_is_updated_as_ever() -> None:
    """Beside bf16 weights in the same optimizer, and moments in fp32 of bf16 weights."""
    start = torch.randn(50)
    found = []
    for rounds in (True, False):
        params = [start.clone().requires_grad_(), start.bfloat16().requires_grad_()]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = lightning_ep.AdamW(params, stochastic_rounding=rounds)
        optimizer.step()
        found.append(params)
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])
    wide = Update(start.bfloat16(), start, torch.zeros(50), torch.zeros(50), _STEP)
    adamw_rounded_(wide, Rule(1e-3, (0.9, 0.999), 1e-8, 0.0), None, _elements(50))
    assert torch.equal(wide.exp_avg, start * (1 - 0.9))
