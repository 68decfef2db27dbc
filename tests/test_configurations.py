"""Wrong configurations raise early, with the values, the rule and a fix; unusual right ones work."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import accelerator_connector
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_ep import CausalLM, ExpertParallelStrategy, ParallelLayout, expert_plan, from_config
from lightning_ep.parallelize import check, shard
from lightning_ep.trainer.cost_warnings import warn_if_ep_crosses_nodes
from tests.ranks import run_ranks
from tests.reference import tiny_config, tiny_model
from tests.tiny import Samples, TinyModule, loader


def _trainer(tmp_path: Path, **arguments: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_steps": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
    }  # fmt: skip
    return L.Trainer(**{**quiet, **arguments})


@pytest.mark.parametrize(
    ("ep", "fsdp", "world", "per_node", "expected"),
    [
        ("auto", "auto", 16, 8, (8, 2)),
        ("auto", "auto", 1, 1, (1, 1)),
        ("auto", 4, 8, 8, (2, 4)),
        (2, "auto", 8, 8, (2, 4)),
        (64, "auto", 64, 8, (64, 1)),
    ],
)
def test_auto_sizes(ep: Any, fsdp: Any, world: int, per_node: int, expected: tuple[int, int]) -> None:
    layout = ParallelLayout.resolve(ep, fsdp, world, per_node)
    assert (layout.ep, layout.fsdp) == expected


@pytest.mark.parametrize(
    ("ep", "fsdp", "message"),
    [
        (3, "auto", r"fsdp=2 times ep=3 is 6, but there are 8.*choose one of \[1, 2, 4, 8\]"),
        (4, 4, r"fsdp=4 times ep=4 is 16, but there are 8.*use fsdp=2"),
        (0, "auto", "ep=0: must be a positive integer"),
        ("all", "auto", "ep='all': must be a positive integer or 'auto'"),
        (16, "auto", r"ep=16 .* there are 8 processes"),
    ],
)
def test_sizes_that_do_not_fit_the_world(ep: Any, fsdp: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelLayout.resolve(ep, fsdp, 8, 8)


def test_the_trainer_refuses_a_layout_before_it_launches_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ep=3 .*there are 2 processes"):
        _trainer(tmp_path, devices=2, strategy=ExpertParallelStrategy(ep=3))


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_precisions_that_do_not_exist(tmp_path: Path, precision: Any) -> None:
    with pytest.raises(ValueError, match=rf"{precision}.*bf16-mixed"):
        _trainer(tmp_path, strategy=ExpertParallelStrategy(), precision=precision)


def test_ep_that_does_not_divide_the_experts_names_the_best_layout() -> None:
    with pytest.raises(ValueError, match=r"ep=16 does not divide the 8 experts of mlp.*use ep=8, fsdp=2"):
        ParallelLayout(world_size=16, ep=16).check_num_experts(8, "mlp")


def test_a_dense_model_and_a_module_without_a_model() -> None:
    dense = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=1, num_key_value_heads=1, head_dim=8))  # fmt: skip
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM .*no experts to parallelise.*FSDPStrategy"):
        expert_plan(dense)
    with pytest.raises(ValueError, match="Linear contains no transformers model"):
        expert_plan(nn.Linear(2, 2))


class _Module(CausalLM):
    def __init__(self, **overrides: Any) -> None:
        super().__init__(tiny_config(), pretrained=False)
        self.model = tiny_model(**overrides)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            {"experts_implementation": "fastest"},
            r"'fastest' is not registered; choose 'auto', 'fused' or one of \[.*eager",
        ),
    ],
)
def test_names_that_do_not_exist_leave_the_model_alone(tmp_path: Path, strategy: Any, message: str) -> None:
    module = _Module()
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, strategy=ExpertParallelStrategy(**strategy)).fit(module, DataLoader(Samples(2)))
    assert not any(isinstance(p, torch.distributed.tensor.DTensor) for p in module.parameters())
    assert module.model.model.layers[0].mlp.experts.num_experts == 8


def test_a_parameter_of_the_module_itself_is_named(tmp_path: Path) -> None:
    module = _Module()
    module.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"the parameter temperature of _Module .*submodule"):
        _trainer(tmp_path, strategy=ExpertParallelStrategy()).fit(module, DataLoader(Samples(2)))


class _HiddenModel(TinyModule):
    model = None


def test_a_model_behind_a_class_attribute_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"self.model of _HiddenModel is None .*`self.model = None` behind `super"):
        _trainer(tmp_path, strategy=ExpertParallelStrategy()).fit(_HiddenModel(), DataLoader(Samples(2)))


def test_a_layout_that_cannot_fill_in_auto_says_which_call_does() -> None:
    with pytest.raises(ValueError, match=r"Only ParallelLayout\.resolve fills in 'auto'") as refusal:
        ParallelLayout(ep="auto")  # type: ignore[arg-type]
    advised = re.search("`(.*)`", str(refusal.value))
    assert advised is not None
    sizes = {"world_size": 8, "processes_per_node": 4}
    assert eval(advised[1], {"ParallelLayout": ParallelLayout, **sizes}) == ParallelLayout(8, ep=4, fsdp=2)


class _Shares(nn.Module):
    """Modules that hold one parameter together."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.lm, self.a, self.b = tiny_model(), nn.Linear(32, 128, bias=False), nn.Linear(32, 128, bias=False)
        self.other = tiny_model(seed=1) if what == "two models" else None
        first, second = self.lm.model.layers
        if what == "heads":
            self.b.weight = self.a.weight
        elif what == "head of the model":
            self.a.weight = self.lm.lm_head.weight
        elif what == "two models":
            assert self.other is not None
            self.other.lm_head.weight = self.lm.lm_head.weight
        elif what == "experts":
            second.mlp.experts.down_proj = first.mlp.experts.down_proj
        elif what == "attention":  # one group of FSDP
            second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
        elif what == "experts module":
            second.mlp.experts = first.mlp.experts


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("heads", "a.weight and b.weight"),
        ("head of the model", "lm.lm_head.weight and a.weight"),
        ("two models", "lm.lm_head.weight and other.lm_head.weight"),
        ("experts", "layers.0.mlp.experts.down_proj and lm.model.layers.1.mlp.experts.down_proj"),
        ("attention", None),
        ("experts module", None),
        ("nothing", None),
    ],
)
def test_parameters_that_would_become_two_are_refused(what: str, names: str | None) -> None:
    module = _Shares(what)
    raises = pytest.raises(ValueError, match=f"{names} are one parameter") if names else nullcontext()
    with raises:
        check(module, ParallelLayout.resolve(1, 1, 1, 1), expert_plan(module))


def test_causal_lm_needs_this_strategy(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"SingleDeviceStrategy.*strategy=ExpertParallelStrategy"):
        _trainer(tmp_path).fit(CausalLM(tiny_config(), pretrained=False), DataLoader(Samples(2)))
    with pytest.raises(ValueError, match="pretrained=False"):
        CausalLM(tiny_config())


@pytest.mark.parametrize("name", ["ep", "expert_parallel"])
def test_one_process_trains_in_a_notebook_by_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    trainer = _trainer(tmp_path, strategy=name)
    assert trainer.strategy.launcher is None
    trainer.fit(CausalLM(tiny_config(), pretrained=False), DataLoader(Samples(2)))
    assert trainer.global_step == 1
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_several_processes_in_a_notebook_are_told_to_become_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(ValueError, match=r"torchrun --nproc-per-node 2 script\.py"):
        L.Trainer(strategy="ep", devices=2, accelerator="cpu")
    L.Trainer(strategy="ep", devices=1, accelerator="cpu")


class _Interrupted(L.Callback):
    def on_validation_batch_end(self, *_: Any) -> None:
        raise KeyError("interrupted")


def test_an_interrupted_evaluation_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    module = CausalLM(tiny_config(), pretrained=False)
    first, second = DataLoader(Samples(2)), DataLoader(Samples(2, first=50))
    with pytest.raises(KeyError):
        _trainer(tmp_path, strategy="ep", callbacks=[_Interrupted()]).validate(module, first, verbose=False)
    losses = [_trainer(tmp_path, strategy="ep").validate(module, second, verbose=False)[0] for _ in range(2)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("distributed", [True, False])
def test_every_feature_on_one_process(tmp_path: Path, distributed: bool) -> None:
    def run(**arguments: Any) -> tuple[L.Trainer, TinyModule]:
        strategy = ExpertParallelStrategy(save_distributed_checkpoint=distributed)
        flags = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
        return _trainer(tmp_path, strategy=strategy, **{**flags, **arguments}), TinyModule()

    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer, straight = run(callbacks=[saved], enable_checkpointing=True, max_steps=2)
    trainer.fit(straight, loader(4), loader(3))
    trainer, resumed = run(max_steps=2)
    trainer.fit(resumed, loader(4), loader(3), ckpt_path=tmp_path / "step=1.ckpt")
    assert (trainer.global_step, resumed.losses) == (2, straight.losses[2:])
    losses = [getattr(trainer, stage)(resumed, loader(3), verbose=False)[0] for stage in ("validate", "test")]
    assert losses[0]["val_loss"] == losses[1]["test_loss"]
    assert [i for ids in trainer.predict(resumed, loader(3)) for i in ids.tolist()] == [0, 1, 2]


def test_half_precision_by_strategy_name_on_a_cpu_is_what_lightning_makes_of_it(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="fp16 is not supported on CPU. Using `precision='bf16-mixed'` instead"):
        trainer = _trainer(tmp_path, strategy="ep", precision="16-mixed")
    assert trainer.precision == "bf16-mixed"


def test_the_other_lightning_package_gets_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning", ModuleType("pytorch_lightning"))
    with pytest.warns(UserWarning, match="`pytorch_lightning` is imported.*`from lightning.pytorch import Trainer`"):
        ExpertParallelStrategy()


@pytest.mark.parametrize(
    ("ep", "per_node", "rows"),
    [
        (4, 2, "up to 2 rows of 0.0625 KiB .* up to 0.5 KiB per token and layer"),
        (8, 2, "up to 4 rows of 0.0625 KiB .* up to 1 KiB per token and layer"),  # six ranks elsewhere, but top-4
        (4, 3, "up to 3 rows of"),  # one rank of the group is alone on its node
        (2, 2, None),
    ],
)
def test_ep_groups_across_nodes_get_a_warning(
    ep: int, per_node: int, rows: str | None, recwarn: pytest.WarningsRecorder
) -> None:
    with torch.device("meta"):
        model = tiny_model()
    warn_if_ep_crosses_nodes(model, ParallelLayout(8, ep, 8 // ep), per_node)
    found = [str(w.message) for w in recwarn if "cross nodes" in str(w.message)]
    assert len(found) == (rows is not None)
    assert all(re.search(f"ranks 0 to {ep - 1} cross nodes of {per_node} .*{rows}", text) for text in found), found


def _place_on_fake_ranks(ep: int, fsdp: int, rank: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ep * fsdp)
    config = tiny_config(num_experts=128, num_experts_per_tok=8, num_attention_heads=8, num_key_value_heads=4)
    model = from_config(config)
    layout = ParallelLayout(ep * fsdp, ep, fsdp)
    shard(model, layout, layout.build_meshes("cpu"), torch.device("cpu"), expert_plan(model), MixedPrecisionPolicy())
    for layer in model.model.layers:
        gate_up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        assert gate_up.shape == (128, 32, 32)
        assert down.shape == (128, 32, 16)
        assert gate_up.to_local().shape == (128 // ep, 32 // fsdp, 32), gate_up.to_local().shape
        assert down.to_local().shape == (128 // ep, 32 // fsdp, 16), down.to_local().shape
        assert layer.mlp.experts.num_experts == 128 // ep
        assert layer.self_attn.k_proj.weight.device_mesh.size() == ep * fsdp


@pytest.mark.parametrize(("ep", "fsdp", "rank"), [(16, 1, 5), (32, 2, 63), (64, 1, 63)])
def test_ep_is_not_bound_by_attention_heads(ep: int, fsdp: int, rank: int) -> None:
    run_ranks(1, _place_on_fake_ranks, ep, fsdp, rank, init_process_group=False)
