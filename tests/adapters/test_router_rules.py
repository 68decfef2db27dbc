"""Losses of routers beside adapters are those of PEFT and transformers on one process, whatever wraps a router."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ep import CausalLM, ExpertParallelStrategy, LoRA
from lightning_ep import transformers_adapter as adapter
from lightning_ep.callbacks import ExpertLoadMonitor
from lightning_ep.routing import BalancingLoss, RouterZLoss, moe_layers
from tests.adapters.test_gradients import SIZES
from tests.parity import _adapted as adapted
from tests.parity import as_peft, lora_like_peft
from tests.ranks import assert_ranks_agree
from tests.reference import adapted_by_peft, batches, family_model, grad_or_zero, relative_error
from tests.tiny import quiet

NUM_EXPERTS, TOP_K = 8, 2
BALANCE, Z = 0.5, 0.05
RULES = [BalancingLoss(BALANCE), RouterZLoss(Z)]
QWEN = ("qwen3_moe", {"num_experts": NUM_EXPERTS})
ROUTER = {"modules_to_save": ["gate"]}
# Its routers are found by what stands beside the experts, and score by sigmoids.
DEEPSEEK = ("deepseek_v3", {"n_routed_experts": NUM_EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
                            "kv_lora_rank": 8, "q_lora_rank": None, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                            "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 8})  # fmt: skip
# In its routers is a linear layer, which may have an adapter of its own.
HUNYUAN = ("hunyuan_v1_moe", {"num_experts": NUM_EXPERTS, "moe_topk": TOP_K, "num_shared_expert": 1})
CASES: dict[str, dict[str, Any]] = {
    "frozen": {"model": QWEN, "of_router": set()},
    "trained whole": {"model": QWEN, "options": ROUTER, "of_router": {"modules_to_save.default.weight"}},
    "trained whole, of another family": {"model": DEEPSEEK, "options": {**ROUTER, "target_modules": ["o_proj"]},
                                         "of_router": {"modules_to_save.default.weight"}},
    "adapted": {"model": HUNYUAN, "options": {"target_modules": ["o_proj", "wg"]},
                "of_router": {"wg.lora_A.default.weight", "wg.lora_B.default.weight"}},
}  # fmt: skip


def _model(case: dict[str, Any]) -> Any:
    family, config = case["model"]
    return family_model(family, {**SIZES, **config})


def _one_process(case: dict[str, Any], batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of PEFT's model, and what is logged of the routers, by the formulas of the page."""
    model: Any = adapted_by_peft(_model(case), "both", **case.get("options", {}))
    called: list[tuple[Tensor, Tensor, Tensor]] = []  # logits, weights and ids
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, output: called.append(output))
    loss = model(**batch).loss
    balance, z, entropy, violation, dead = [], [], [], [], 0
    for logits_TE, _, ids_TK in called:
        logits_TE = logits_TE.flatten(0, -2).double()
        of_sigmoids = case["model"] is DEEPSEEK
        scores_TE = F.normalize(logits_TE.sigmoid(), p=1, dim=-1) if of_sigmoids else logits_TE.softmax(-1)
        chosen_TE = F.one_hot(ids_TK.flatten(0, -2), NUM_EXPERTS).sum(1).double()
        balance.append(NUM_EXPERTS * (chosen_TE.mean(0) * scores_TE.mean(0)).sum())
        z.append(logits_TE.logsumexp(-1).square().mean())
        entropy.append(torch.special.entr(scores_TE).sum(-1).mean() / math.log(NUM_EXPERTS))
        violation.append(chosen_TE.sum(0).max() / chosen_TE.sum(0).mean() - 1)
        dead += int((chosen_TE.sum(0) == 0).sum())
    assert len(called) == SIZES["num_hidden_layers"]
    mean_balance, mean_z = torch.stack(balance).mean(), torch.stack(z).mean()
    (loss + BALANCE * mean_balance + Z * mean_z).backward()
    logged = {
        "train/router_balance": mean_balance, "train/router_z": mean_z, "routing/dead_experts": dead,
        "routing/entropy": torch.stack(entropy).mean(), "routing/max_violation": torch.stack(violation).mean(),
    }  # fmt: skip
    gradients = {name: grad_or_zero(param) for name, param in model.named_parameters() if param.requires_grad}
    return gradients, {name: float(value) for name, value in logged.items()}


class _Seeded(CausalLM):
    """`CausalLM` with the reference's weights in memory."""

    case: dict[str, Any]

    def configure_model(self) -> None:
        if self.model is None:
            self.model = adapted(_model(self.case), self._adapter)


class _Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        trained = {name: param for name, param in module.model.named_parameters() if param.requires_grad}
        self.found = {name: as_peft(name, param.grad.full_tensor()).cpu().clone() for name, param in trained.items()}


def _fit(root: Path, name: str, layout: dict[str, Any]) -> list[str]:
    case, recorder = CASES[name], _Gradients()
    callbacks = [recorder, ExpertLoadMonitor()]
    strategy = ExpertParallelStrategy(**layout)
    trainer = quiet(
        root, strategy=strategy, max_steps=1, log_every_n_steps=1, callbacks=callbacks, use_distributed_sampler=False
    )
    data = batches(strategy.data_world_size, 2)
    whole = {key: torch.cat([batch[key] for batch in data]) for key in data[0]}
    gradients, logged = _one_process(case, whole)
    module = _Seeded(
        _model(case).config, pretrained=False, router=RULES, adapter=lora_like_peft("both", **case.get("options", {})),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    )  # fmt: skip
    module.case = case
    mine = data[strategy.layout.data_rank(int(os.environ["RANK"]))]
    trainer.fit(module, DataLoader([mine], batch_size=None))  # type: ignore[arg-type]
    of_router = {key.partition(".gate.")[2] for key in gradients if ".mlp.gate." in key}
    wrong = [f"trained of the router: {of_router}"] if of_router != case["of_router"] else []
    if recorder.found.keys() != gradients.keys():
        return [*wrong, f"trained: {sorted(recorder.found.keys() ^ gradients.keys())}"]
    for key, expected in gradients.items():
        if not (error := relative_error(recorder.found[key], expected)) <= 1e-5:
            wrong.append(f"{key}: {error:.1e}")
    for key, value in logged.items():
        if not abs((found := trainer.logged_metrics[key].item()) - value) <= 1e-5 * abs(value):
            wrong.append(f"{key}: {found} in place of {value}")
    return wrong


@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        *((name, 2, {"ep": 2}) for name in CASES),
        ("trained whole", 1, {"ep": 1}),
        ("trained whole", 2, {"ep": 1, "activation_checkpointing": "selective"}),
        ("trained whole", 2, {"ep": 2, "activation_checkpointing": "full"}),
        pytest.param(
            *("trained whole", 2, {"ep": 2, "activation_checkpointing": "full", "compile": True}),
            marks=(pytest.mark.slow, pytest.mark.timeout(360)),
        ),
        pytest.param(
            "trained whole", 2, {"ep": 2, "compile": True}, marks=(pytest.mark.slow, pytest.mark.timeout(360))
        ),
    ],
)
def test_losses_of_routers_reach_what_is_trained(name: str, world: int, layout: dict[str, Any], tmp_path: Path) -> None:
    assert_ranks_agree(world, _fit, tmp_path, name, layout, init_process_group=False, timeout=300)


def test_the_router_of_a_layer_is_what_the_layer_calls() -> None:
    for family, config in (QWEN, DEEPSEEK):
        plain = family_model(family, {**SIZES, **config})
        model: Any = adapted_by_peft(copy.deepcopy(plain), "experts", modules_to_save=["gate"])
        layers = moe_layers(model)
        assert [layer.router for layer in layers] == [layer.mlp.gate for layer in model.model.layers]
        assert {layer.router for layer in layers} == adapter.routers([model])
        scoring = [adapter.router_scoring(layer.router) for layer in moe_layers(plain)]  # type: ignore[arg-type]
        assert [adapter.router_scoring(layer.router) for layer in layers] == scoring  # type: ignore[arg-type]


class _PastTheModule(nn.Module):
    """A user's, which runs a router without calling it."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> Any:
        return self.router.forward(hidden)


class _Past(_Seeded):
    def configure_model(self) -> None:
        super().configure_model()
        for layer in self.model.model.layers:  # type: ignore[union-attr]
            layer.mlp.gate = _PastTheModule(layer.mlp.gate)  # type: ignore[union-attr]


def test_a_router_that_nobody_calls_is_named(tmp_path: Path) -> None:
    module = _Past(_model(CASES["frozen"]).config, pretrained=False, router=RULES, adapter=LoRA())
    module.case = CASES["frozen"]
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=1)
    with pytest.raises(RuntimeError, match=r"need the logits of model.layers.0.mlp.experts, .*Qwen3MoeTopKRouter"):
        trainer.fit(module, DataLoader(batches(1, 2), batch_size=None))  # type: ignore[arg-type]


def test_a_router_is_not_both_frozen_and_trained(tmp_path: Path) -> None:
    config = _model(CASES["frozen"]).config
    module = CausalLM(config, pretrained=False, freeze_router=True, adapter=LoRA(modules_to_save=["gate"]))
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), max_steps=1)
    with pytest.raises(ValueError, match=r"freeze_router=True, and the adapter trains .*modules_to_save.default"):
        trainer.fit(module, DataLoader(batches(1, 2), batch_size=None))  # type: ignore[arg-type]
