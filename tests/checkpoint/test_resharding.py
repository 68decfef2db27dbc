"""Weights and AdamW moments that one layout saved and another loaded are equal bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor

from lightning_ep import AdamW, ExpertParallelStrategy, cli
from lightning_ep.cli.consolidate import consolidate
from lightning_ep.hub.errors import CheckpointError
from tests.ranks import RankFailure, run_ranks
from tests.reference import tiny_model
from tests.tiny import TinyModule, loader, quiet

# World size, ep, tp, width of an expert. A width that fsdp does not divide makes FSDP shard whole experts: strided
# shards.
EVEN, UNEVEN = 16, 15
LAYOUTS = [
    (4, 4, 1, EVEN),
    (4, 2, 1, EVEN),
    (4, 2, 1, UNEVEN),
    (4, 2, 2, UNEVEN),
    (2, 2, 1, EVEN),
    (2, 2, 2, EVEN),
    (2, 1, 1, UNEVEN),
    (1, 1, 1, EVEN),
]
IN_ONE_FILE = [(4, 2, 1, EVEN), (4, 2, 1, UNEVEN), (2, 2, 2, EVEN), (1, 1, 1, EVEN)]
State = dict[str, torch.Tensor]


def _num_experts(width: int) -> int:
    return 8 if width == EVEN else 6  # 3 on each of 2 ranks, which FSDP cuts into 2 and 1


class _Module(TinyModule):
    def __init__(self, width: int) -> None:
        super().__init__(moe_intermediate_size=width, num_experts=_num_experts(width))

    def configure_optimizers(self) -> Any:
        names = dict(self.named_parameters())
        norms = [p for name, p in names.items() if "norm" in name]
        others = [p for name, p in names.items() if "norm" not in name]
        groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _name(world_size: int, ep: int, tp: int, width: int, distributed: bool) -> str:
    return f"{'dir' if distributed else 'file'}-{world_size}-{ep}-{tp}-{width}.ckpt"


def _strategy(ep: int, **arguments: Any) -> ExpertParallelStrategy:
    return ExpertParallelStrategy(ep=ep, experts_implementation="eager", **arguments)


def _save(root: Path, world_size: int) -> dict[str, State]:
    expected = {}
    for world, ep, tp, width in LAYOUTS:
        if world != world_size:
            continue
        for distributed in (True, False) if (world, ep, tp, width) in IN_ONE_FILE else (True,):
            module = _Module(width)
            strategy = _strategy(ep, tp=tp, save_distributed_checkpoint=distributed)
            trainer = quiet(root, strategy=strategy, max_steps=2)
            trainer.fit(module, loader(16))
            name = _name(world, ep, tp, width, distributed)
            trainer.save_checkpoint(root / name)
            expected[name] = _state(trainer, module)
    return expected


def _two_others(name: str) -> list[tuple[int, int, int, int]]:
    """Layouts that load a checkpoint in the short form, which every layout is for some; others for files."""
    kind, *sizes = name.removesuffix(".ckpt").split("-")
    same = [layout for layout in LAYOUTS if layout[-1] == int(sizes[-1])]
    own, step = same.index(tuple(map(int, sizes))), 1 if kind == "dir" else -1
    return [same[(own + step) % len(same)], same[(own + 2 * step) % len(same)]]


def _load(root: Path, world_size: int, names: list[str], every: bool) -> dict[str, State]:
    found = {}
    for world, ep, tp, width in LAYOUTS:
        if world != world_size:
            continue
        for name in names:
            if name.endswith(f"-{width}.ckpt") if every else (world, ep, tp, width) in _two_others(name):
                module = _Module(width)
                trainer = quiet(root, strategy=_strategy(ep, tp=tp), max_steps=2)
                trainer.fit(module, loader(16), ckpt_path=root / name)
                assert trainer.global_step == 2
                assert trainer.optimizers[0].param_groups[1]["weight_decay"] == 0.0
                assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2
                found[f"{name} with {world}, {ep}, {tp}"] = _state(trainer, module)
    return found


def _state(trainer: L.Trainer, module: L.LightningModule) -> State:
    """Weights and optimizer state in full, on rank 0."""
    state: State = {}
    optimizer = trainer.optimizers[0]
    for name, param in module.named_parameters():
        state[name] = _whole(param)
        for key, value in optimizer.state[param].items():
            state[f"{name}:{key}"] = _whole(value)
    return state if trainer.is_global_zero else {}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, State]]:
    root = tmp_path_factory.mktemp("layouts")
    expected: dict[str, State] = {}
    for world_size in (4, 2, 1):
        expected |= run_ranks(world_size, _save, root, world_size, init_process_group=False)[0]
    return root, expected


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two layouts", "every layout"]
)
@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_weights_and_moments_are_equal_bit_for_bit(
    saved: tuple[Path, dict[str, State]], world_size: int, every: bool
) -> None:
    root, expected = saved
    found = run_ranks(world_size, _load, root, world_size, list(expected), every, init_process_group=False)[0]
    assert len(found) >= (7 if every else 2)
    for case, state in found.items():
        reference = expected[case.split()[0]]
        assert state.keys() == reference.keys(), case
        assert sum(":exp_avg" in name for name in state) > 10
        for name, tensor in state.items():
            assert tensor.dtype == reference[name].dtype, f"{case}: {name}"
            assert torch.equal(tensor, reference[name]), f"{case}: {name}"


def test_a_directory_becomes_one_file(saved: tuple[Path, dict[str, State]]) -> None:
    root, expected = saved
    name = _name(4, 2, 1, UNEVEN, True)
    cli.main(["consolidate", str(root / name), str(root / "one" / "all.ckpt")])
    module = TinyModule.load_from_checkpoint(
        root / "one" / "all.ckpt", in_init=True, moe_intermediate_size=UNEVEN, num_experts=6
    )
    for parameter, value in module.named_parameters():
        assert torch.equal(value, expected[name][parameter]), parameter
    (groups,) = torch.load(root / "one" / "all.ckpt", weights_only=True)["lightning_ep"]["optimizer_parameters"]
    assert all(parameter in expected[name] for group in groups for parameter in group)
    (root / "one" / "all.ckpt").rename(root / _name(4, 2, 1, UNEVEN, False))
    found = run_ranks(2, _load, root, 2, [_name(4, 2, 1, UNEVEN, False)], True, init_process_group=False)[0]
    (state,) = found.values()
    assert all(torch.equal(state[key], value) for key, value in expected[name].items())


def _save_untrained(root: Path) -> None:
    for distributed in (True, False):
        trainer = quiet(root, strategy=_strategy(2, save_distributed_checkpoint=distributed))
        trainer.validate(_Module(UNEVEN), loader(8), verbose=False)
        trainer.save_checkpoint(root / f"untrained-{distributed}.ckpt")


def test_experts_keep_their_numbers(tmp_path: Path) -> None:
    """Where shards of 2 and 1 experts interleave, what is saved is the model that one process builds."""
    run_ranks(4, _save_untrained, tmp_path, init_process_group=False)
    consolidate(str(tmp_path / "untrained-True.ckpt"), str(tmp_path / "one.ckpt"))
    model = tiny_model(**_Module(UNEVEN).overrides)
    expected = model.state_dict()
    for name in ("one.ckpt", "untrained-False.ckpt"):
        content = torch.load(tmp_path / name, weights_only=True)
        config = content["lightning_ep"]["configs"]["model"]
        assert config["architectures"] == ["Qwen3MoeForCausalLM"]
        assert type(model.config).from_dict(config).num_experts == 6
        found = content["state_dict"]
        assert found.keys() == {f"model.{key}" for key in expected}
        for key, value in expected.items():
            assert torch.equal(found[f"model.{key}"], value), f"{name}: {key}"


def _mismatches(root: Path, name: str) -> dict[str, str]:
    class OneGroup(_Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    class Frozen(_Module):
        def configure_model(self) -> None:
            super().configure_model()
            self.model.lm_head.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)

    class Two(_Module):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.parameters()), torch.optim.AdamW(self.parameters())]

    messages = {}
    modules = {
        "shape": TinyModule(moe_intermediate_size=32, num_experts=8),
        "missing": TinyModule(moe_intermediate_size=EVEN, num_experts=8, num_hidden_layers=2),
        "groups": OneGroup(EVEN),
        "frozen": Frozen(EVEN),
        "two": Two(EVEN),
    }
    for case, module in modules.items():
        with pytest.raises(CheckpointError) as caught:
            quiet(root, strategy=_strategy(2), max_steps=3).fit(module, loader(16), ckpt_path=root / name)
        messages[case] = str(caught.value)
    return messages


@pytest.mark.parametrize("distributed", [True, False])
def test_what_does_not_fit_is_named(saved: tuple[Path, dict[str, State]], distributed: bool) -> None:
    root, _ = saved
    one, other = run_ranks(2, _mismatches, root, _name(4, 2, 1, EVEN, distributed), init_process_group=False)
    assert one == other
    assert "model.model.layers.0.mlp.experts.down_proj (8, 32, 16) instead of (8, 32, 32)" in one["shape"]
    assert "missing: model.model.layers.1." in one["missing"]
    assert "parameter groups with" in one["groups"] or "groups of" in one["groups"]
    assert "2 optimizers" in one["two"]
    if distributed:
        assert "model.lm_head.weight" in one["frozen"]


class _Trains(TinyModule):
    """All but one module, in either order."""

    def __init__(self, frozen: str, step: int) -> None:
        super().__init__()
        self.frozen, self.step = frozen, step

    def configure_model(self) -> None:
        super().configure_model()
        self.model.get_submodule(self.frozen).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return AdamW([p for p in self.parameters() if p.requires_grad][:: self.step], lr=1e-2)


def _other_numbers(root: Path) -> tuple[bool, str, str]:
    """As many parameters, with other numbers; a file without names of parameters has them by number alone."""
    trainer = quiet(root, strategy=_strategy(2, save_distributed_checkpoint=False), max_steps=2)
    trainer.fit(saved := _Trains("lm_head", 1), loader())
    trainer.save_checkpoint(root / "named.ckpt")
    if trainer.is_global_zero:
        content = torch.load(root / "named.ckpt", weights_only=True)
        del content["lightning_ep"]["optimizer_parameters"]
        torch.save(content, root / "numbered.ckpt")
    again = quiet(root, strategy=_strategy(1), max_steps=2)
    again.fit(resumed := _Trains("lm_head", -1), loader(), ckpt_path=root / "named.ckpt")
    one, other = _state(trainer, saved), _state(again, resumed)
    same = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    messages = []
    for name, module in (("named", _Trains("model.embed_tokens", 1)), ("numbered", _Trains("lm_head", -1))):
        with pytest.raises(CheckpointError) as caught:
            quiet(root, strategy=_strategy(1), max_steps=3).fit(module, loader(), ckpt_path=root / f"{name}.ckpt")
        messages.append(str(caught.value))
    return same, messages[0], messages[1]


def test_optimizers_of_one_file_are_told_by_names(tmp_path: Path) -> None:
    for same, named, numbered in run_ranks(2, _other_numbers, tmp_path, init_process_group=False):
        assert same
        assert "Only saved: model.model.embed_tokens.weight; only here: model.lm_head.weight" in named
        assert "has exp_avg of shape" in numbered


def _other_state(root: Path) -> tuple[bool, str]:
    """State of an optimizer of one's own: plain tensors and values come back, shards of another shape are refused."""
    module = TinyModule()
    trainer = quiet(root, max_steps=1)
    trainer.fit(module, loader())
    head = module.model.lm_head.weight
    trainer.optimizers[0].state[head].update(count=7, scale=torch.tensor([1.0, 2.0]))
    trainer.save_checkpoint(root / "own.ckpt")
    resumed = TinyModule()
    again = quiet(root, max_steps=1)
    again.fit(resumed, loader(), ckpt_path=root / "own.ckpt")
    state = again.optimizers[0].state[resumed.model.lm_head.weight]
    same = state["count"] == 7 and state["scale"].tolist() == [1.0, 2.0]
    trainer.optimizers[0].state[head]["rows"] = torch.distributed.tensor.zeros(3, device_mesh=head.device_mesh)
    with pytest.raises(CheckpointError) as caught:
        trainer.save_checkpoint(root / "refused.ckpt")
    return same, str(caught.value)


def test_other_optimizer_state(tmp_path: Path) -> None:
    for same, message in run_ranks(2, _other_state, tmp_path, init_process_group=False):
        assert same
        assert "keeps 'rows' of shape (3,) for model.lm_head.weight of shape (128, 32)" in message
    assert [path.name for path in tmp_path.iterdir()] == ["own.ckpt"]


class _PerRank:
    """A loader that keeps its position by rank, as most do."""

    def __init__(self) -> None:
        self.taken = 0

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Any:
        for batch in loader(12, batch_size=1):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken, "rank": int(os.environ["RANK"])}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["rank"] == int(os.environ["RANK"])
        self.taken = state["taken"]


def _resume_loader(root: Path, data: Any, resume: str | None) -> tuple[int, int]:
    keep = ModelCheckpoint(root / "saved", every_n_train_steps=3, filename="{step}", save_top_k=-1)
    flags = {"callbacks": [keep], "max_steps": 3} if resume is None else {"max_epochs": 1}
    trainer = quiet(root, strategy=_strategy(1), use_distributed_sampler=False, **flags)
    trainer.fit(TinyModule(), data, ckpt_path=resume)
    return trainer.fit_loop.epoch_loop.batch_progress.current.ready, getattr(data, "taken", 0)


def test_a_position_per_rank_needs_as_many_data_ranks(tmp_path: Path) -> None:
    run_ranks(2, _resume_loader, tmp_path, _PerRank(), None, init_process_group=False)
    path = str(tmp_path / "saved" / "step=3.ckpt")
    again = run_ranks(2, _resume_loader, tmp_path, _PerRank(), path, init_process_group=False)
    assert [taken for _, taken in again] == [3 + 9, 3 + 9]
    with pytest.raises(RankFailure, match="means something only on the 2 data ranks that saved it, and this run has 1"):
        run_ranks(1, _resume_loader, tmp_path, _PerRank(), path, init_process_group=False)


def test_a_loader_without_a_position_goes_on_by_the_count_of_batches(tmp_path: Path) -> None:
    run_ranks(2, _resume_loader, tmp_path, loader(12, batch_size=1), None, init_process_group=False)
    path = str(tmp_path / "saved" / "step=3.ckpt")
    # 3 batches on 2 ranks are 6 of 12 on one, and 1 (rounded down) of 12 on four.
    for world_size in (1, 4):
        ranks = run_ranks(world_size, _resume_loader, tmp_path, loader(12, 1), path, init_process_group=False)
        assert {ready for ready, _ in ranks} == {12}
