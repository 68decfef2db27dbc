"""AdamW(stochastic_rounding=True) takes the same steps, bit for bit, on every layout and after every resume."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_ep import AdamW, ExpertParallelStrategy
from lightning_ep.distributed.shards import local_region, local_tensor
from tests.ranks import device, run_ranks
from tests.rows import whole
from tests.tiny import TinyModule, loader, quiet

_STEPS = 4


def _given(name: str, step: int, shape: torch.Size) -> Tensor:
    """A gradient that depends on nothing but these."""
    seed = int.from_bytes(hashlib.sha256(f"{name}/{step}".encode()).digest()[:6], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Given(TinyModule):
    """Whatever it computes, its steps get the same gradients."""

    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-3, weight_decay=0.1, stochastic_rounding=True)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for name, param in self.model.named_parameters():
            if self.trainer.precision == "bf16-true":
                assert param.dtype == param.grad.dtype == torch.bfloat16
            full = _given(name, self.global_step, param.shape).to(param.device)
            local_tensor(param.grad).copy_(local_region(param).of(full))
            assert torch.equal(whole(param.grad), full.cpu()), name


class AtStep(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def _trained(
    root: str, seed: int, steps: int, resume: str | None, save: str | None, precision: str, layout: dict[str, int]
) -> dict[str, Tensor]:
    """Weights and moments of a run, whole; with fp32 weights those of matrices."""
    L.seed_everything(seed)
    module = Given(num_hidden_layers=2, moe_intermediate_size=18)
    callbacks: list[Any] = [AtStep(2, Path(save))] if save else []
    trainer = quiet(
        Path(root), max_steps=steps, precision=precision, callbacks=callbacks,
        strategy=ExpertParallelStrategy(**layout), enable_checkpointing=False,
    )  # fmt: skip
    found: dict[str, Tensor] = {}

    class Keeps(L.Callback):
        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            (optimizer,) = trainer.strategy.optimizers
            for name, param in module.model.named_parameters():
                state = optimizer.state[param]
                if precision == "bf16-mixed" and param.ndim == 1:
                    assert {param.dtype, state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
                    continue
                assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
                found.update({name: whole(param), f"{name}.m": whole(state["exp_avg"])})
                found[f"{name}.v"] = whole(state["exp_avg_sq"])

    trainer.callbacks.append(Keeps())
    trainer.fit(module, loader(64, 1), ckpt_path=resume)
    assert module.global_step == steps
    return found


def _on(
    world: int, root: Path, seed: int = 1, steps: int = _STEPS, resume: Any = None, save: Any = None,
    precision: str = "bf16-true", **layout: int,
) -> dict[str, Tensor]:  # fmt: skip
    ways = [None if way is None else str(way) for way in (resume, save)]
    return run_ranks(world, _trained, str(root), seed, steps, *ways, precision, layout)[0]


def _differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """On one rank."""
    return _on(1, tmp_path_factory.mktemp("alone"), ep=1)


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (2, {"ep": 2, "tp": 2}),
        (2, {"ep": 1}),
        (4, {"ep": 4}),
        (4, {"ep": 2}),
        (4, {"ep": 2, "fsdp": 1, "replicate": 2}),
    ],
)
def test_layouts_agree_bit_for_bit(
    alone: dict[str, Tensor], tmp_path: Path, world: int, layout: dict[str, int]
) -> None:
    assert _differences(_on(world, tmp_path, **layout), alone) == []


def test_a_run_goes_on_with_the_same_bits_on_another_layout(alone: dict[str, Tensor], tmp_path: Path) -> None:
    """Though it has another seed, as a run without `seed_everything` would."""
    saved = tmp_path / "at_step_2.ckpt"
    _on(4, tmp_path, steps=2, save=saved, ep=2)
    assert _differences(_on(2, tmp_path, seed=5, resume=saved, ep=2), alone) == []


def test_moments_beside_fp32_weights_agree_on_another_layout_and_after_a_resume(tmp_path: Path) -> None:
    expected = _on(1, tmp_path / "alone", precision="bf16-mixed", ep=1)
    assert {tensor.dtype for name, tensor in expected.items() if name.endswith("weight")} == {torch.float32}
    saved = tmp_path / "at_step_2.ckpt"
    _on(4, tmp_path, steps=2, save=saved, precision="bf16-mixed", ep=2)
    assert _differences(_on(2, tmp_path, seed=5, resume=saved, precision="bf16-mixed", ep=2), expected) == []


def test_another_seed_rounds_otherwise(alone: dict[str, Tensor], tmp_path: Path) -> None:
    other = _on(1, tmp_path, seed=5, ep=1)
    assert _differences(other, alone)
    for name, tensor in other.items():  # but not far
        assert (tensor.float() - alone[name].float()).abs().max() <= 0.05 * alone[name].float().abs().max(), name


# ---------------------------------------------------------------------------------------------- placements

_PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = {
    "rows": ((8, 6), (4,), [Shard(0)]),
    "uneven_rows_and_an_empty_shard": ((5, 6), (4,), [Shard(0)]),
    "columns": ((6, 10), (4,), [Shard(1)]),
    "copies_of_columns": ((6, 10), (2, 2), [Replicate(), Shard(1)]),
    "rows_and_columns": ((5, 7), (2, 2), [Shard(1), Shard(0)]),
    "experts_and_rows": ((6, 4, 10), (2, 2), [Shard(1), Shard(0)]),
    "rows_twice": ((9, 4), (2, 2), [Shard(0), Shard(0)]),
    "two_dimensions_behind_the_first": ((3, 6, 10), (2, 2), [Shard(1), Shard(2)]),
    "all_three": ((4, 6, 5, 3), (2, 2), [Shard(3), Shard(1)]),
    "a_vector": ((7,), (4,), [Shard(0)]),
}  # fmt: skip


def _stepped(shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: list[Any]) -> list[Tensor]:
    mesh = init_device_mesh(device().type, mesh_shape) if mesh_shape else None

    def placed(full: Tensor) -> Tensor:
        full = full.to(device())
        return full if mesh is None else distribute_tensor(full, mesh, placements)

    param = placed(torch.linspace(0.01, 2, torch.Size(shape).numel()).view(shape).bfloat16()).requires_grad_()
    optimizer = AdamW([("weight", param)], lr=1e-3, stochastic_rounding=True)
    for step in range(3):
        param.grad = placed(_given("weight", step, param.shape))
        optimizer.step()
    state = optimizer.state[param]
    return [whole(tensor) for tensor in (param, state["exp_avg"], state["exp_avg_sq"])]


def _all_placements() -> dict[str, list[Tensor]]:
    return {name: _stepped(*case) for name, case in _PLACEMENTS.items()}


def test_parts_are_those_of_the_whole_however_it_is_cut() -> None:
    for found in run_ranks(4, _all_placements):
        for name, (shape, _, _) in _PLACEMENTS.items():
            expected = _stepped(shape, (), [])
            assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found[name], expected, strict=True)), name


# ---------------------------------------------------------------------------------------------- without a strategy


def _one_step(params: Any, **flags: Any) -> tuple[AdamW, Tensor]:
    optimizer = AdamW(params, lr=1e-3, stochastic_rounding=True, **flags)
    return optimizer, optimizer.param_groups[0]["params"][-1]


def test_keys_come_from_names_and_go_with_the_state() -> None:
    def build() -> list[tuple[str, Tensor]]:
        return [(name, torch.ones(64).bfloat16().requires_grad_()) for name in ("a", "b")]

    def step(optimizer: AdamW) -> None:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones(64).bfloat16()
        optimizer.step()

    named, again = AdamW(build(), stochastic_rounding=True), AdamW(build()[::-1], stochastic_rounding=True)
    for optimizer in (named, again):
        step(optimizer)
    (a, b), (b_again, a_again) = (optimizer.param_groups[0]["params"] for optimizer in (named, again))
    assert torch.equal(a, a_again)
    assert torch.equal(b, b_again)
    assert not torch.equal(a, b)
    copied = copy.deepcopy(named)  # without names, but with its state
    loaded = AdamW([param.detach().clone().requires_grad_() for param in (a, b)], stochastic_rounding=True)
    loaded.load_state_dict(copy.deepcopy(named.state_dict()))
    for optimizer in (named, copied, loaded):
        step(optimizer)
        assert all(map(torch.equal, optimizer.param_groups[0]["params"], (a, b)))


def test_a_state_of_torchs_adamw_does_not_turn_it_off() -> None:
    param = torch.ones(4).bfloat16().requires_grad_()
    param.grad = torch.ones_like(param)
    theirs = torch.optim.AdamW([param], fused=True)
    theirs.step()
    ours = AdamW([param], stochastic_rounding=True)
    ours.load_state_dict(theirs.state_dict())
    assert ours.rounds
    ours.step()
    theirs.load_state_dict(ours.state_dict())
    theirs.step()


def _with_moments(steps: int, **flags: Any) -> tuple[AdamW, Tensor, Tensor]:
    matrix, vector = (torch.linspace(0.1, 1, 12).view(shape).requires_grad_() for shape in ((3, 4), (12,)))
    optimizer = AdamW([matrix, vector], lr=1e-3, **flags)
    for step in range(steps):
        matrix.grad, vector.grad = (_given("moments", step, p.shape).float() for p in (matrix, vector))
        optimizer.step()
    return optimizer, matrix, vector


def _dtypes(optimizer: AdamW, param: Tensor) -> set[torch.dtype]:
    return {optimizer.state[param][key].dtype for key in ("exp_avg", "exp_avg_sq")}


def test_states_get_the_dtype_of_who_loads_them() -> None:
    wide, *_ = _with_moments(2)
    narrow, matrix, vector = _with_moments(2, stochastic_rounding=True)
    assert _dtypes(narrow, matrix) == {torch.bfloat16}
    assert _dtypes(narrow, vector) == {torch.float32}
    kept = {key: narrow.state[matrix][key].clone() for key in ("exp_avg", "exp_avg_sq")}
    narrow.load_state_dict(copy.deepcopy(narrow.state_dict()))
    assert _dtypes(narrow, matrix) == {torch.bfloat16}
    assert all(torch.equal(narrow.state[matrix][key], moment) for key, moment in kept.items())
    # What says how to compute is of the optimizer that loads (see `continued_groups`), as a resume has it.
    state = wide.state_dict()
    state["param_groups"][0]["stochastic_rounding"] = True
    narrow.load_state_dict(state)
    assert _dtypes(narrow, matrix) == {torch.bfloat16}
    narrow.step()
    theirs = torch.optim.AdamW([matrix, vector], fused=True)
    theirs.load_state_dict(narrow.state_dict())
    theirs.step()
    assert theirs.state[matrix]["exp_avg"].dtype == torch.float32
    with pytest.raises(ValueError, match="group"):
        AdamW([matrix]).load_state_dict(narrow.state_dict())


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"callbacks": [GradientAccumulationScheduler({1: 3})]}, "accumulate_grad_batches=3"),
    ],
    ids=["accumulation", "accumulation later"],
)
def test_is_refused_before_anything_runs(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    module = Given()
    trainer = quiet(
        tmp_path,
        strategy=ExpertParallelStrategy(),
        devices=1,
        max_epochs=2,
        **{"precision": "bf16-true", **flags},
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(module, loader(4))
    assert module.losses == []


class Nearest(TinyModule):
    def configure_optimizers(self) -> Any:
        return AdamW(self.parameters(), lr=1e-5)


def test_bf16_weights_rounded_to_the_nearest_are_warned_of(tmp_path: Path) -> None:
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(), devices=1, max_steps=1, precision="bf16-true")
    with pytest.warns(UserWarning, match=r"stochastic_rounding=True"):
        trainer.fit(Nearest(), loader(4))
