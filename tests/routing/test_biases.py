"""Biases balance skewed routers, by the sign rule from the counts of all ranks, and survive another layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel

from lightning_ep import CausalLM, ExpertParallelStrategy, LoRA
from lightning_ep import transformers_adapter as adapter
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.cli.export import export
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.routing import BiasUpdates, RoutingCounts, sum_over_ranks
from lightning_ep.routing.biases import bias_of, give_biases, update_biases
from lightning_ep.routing.observe import moe_layers
from lightning_ep.transformers_adapter.routers import SOFTMAX_TOP_K
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.ranks import assert_ranks_agree, run_ranks
from tests.reference import batches, tiny_model
from tests.tiny import quiet

NUM_EXPERTS, TOP_K, RATE = 8, 4, 0.02


def _skewed() -> PreTrainedModel:
    """Whose routers prefer the first experts by a direction that all tokens share."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.1
        for layer in model.model.layers:
            layer.mlp.gate.weight *= 0.1
            layer.mlp.gate.weight += torch.linspace(0.02, -0.02, NUM_EXPERTS)[:, None]
    return model


class _Skewed(CausalLM):
    """Only the biases change."""

    def __init__(self, rate: float = RATE) -> None:
        super().__init__(
            tiny_model().config,
            pretrained=False,
            optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
            router=BiasUpdates(rate),
        )

    def configure_model(self) -> None:
        if self.model is None:
            self.model = _skewed()

    @property
    def biases(self) -> Tensor:
        return torch.stack([layer.mlp.gate.e_score_correction_bias.cpu() for layer in self.model.model.layers])


def _data(world: int, steps: int) -> list[dict[str, Tensor]]:
    data = batches(world * steps, 4, 16)
    for index, batch in enumerate(data):
        lengths = torch.tensor([[3 + index % 8], [16], [9], [16 - index % 5]])
        batch["attention_mask"] = (torch.arange(16)[None] < lengths).long()
    return data


def _trainer(root: Path, layout: dict[str, Any], **flags: Any) -> Any:
    strategy = ExpertParallelStrategy(**layout)
    return quiet(root, strategy=strategy, use_distributed_sampler=False, log_every_n_steps=1, **flags)


def _loader(world: int, steps: int) -> Any:
    rank = int(os.environ.get("RANK", "0"))
    return DataLoader(_data(world, steps)[rank::world], batch_size=None)  # type: ignore[arg-type]


def _follows_the_rule(root: Path) -> list[str]:
    """Three steps of two micro-batches, against routers of transformers and the rule in plain arithmetic."""
    trainer = _trainer(root, {"ep": 2}, max_steps=3, accumulate_grad_batches=2)
    trainer.fit(module := _Skewed(), _loader(2, 6))
    plain, data = _skewed(), _data(2, 6)
    biases_LE = torch.zeros(2, NUM_EXPERTS)
    for step in range(3):
        counts_LE = torch.zeros(2, NUM_EXPERTS)
        for batch in data[4 * step : 4 * step + 4]:
            gates = [layer.mlp.gate for layer in plain.model.layers]
            hooks = [gate.register_forward_hook(_chooses(b)) for gate, b in zip(gates, biases_LE, strict=True)]
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            output = plain(**inputs, output_router_logits=True)
            for hook in hooks:
                hook.remove()
            counted = batch["attention_mask"].bool().flatten()
            for layer, logits in enumerate(output.router_logits):
                ids = (logits + biases_LE[layer]).topk(TOP_K).indices[counted]
                counts_LE[layer] += ids.flatten().bincount(minlength=NUM_EXPERTS)
        biases_LE = biases_LE + RATE * torch.sign(counts_LE.mean(1, keepdim=True) - counts_LE)
    wrong = [] if torch.allclose(module.biases, biases_LE, atol=1e-6) else [f"{module.biases} and not {biases_LE}"]
    largest = trainer.logged_metrics["train/router_bias"].item()
    return wrong if largest == pytest.approx(biases_LE.abs().max().item()) else [*wrong, f"logged {largest}"]


def _chooses(bias_E: Tensor) -> Any:
    """The paper's rule, as a hook on a router of transformers."""

    def hook(router: Any, args: Any, output: Any) -> Any:
        logits = output[0]
        ids = (logits + bias_E).topk(TOP_K).indices
        weights = logits.softmax(-1).gather(1, ids)
        return logits, weights / weights.sum(1, keepdim=True), ids

    return hook


def test_biases_follow_the_counts_of_all_ranks_and_micro_batches(tmp_path: Path) -> None:
    assert_ranks_agree(2, _follows_the_rule, tmp_path, init_process_group=False)


def _max_violation(counts_LE: Tensor) -> float:
    mean_L1 = counts_LE.double().mean(1, keepdim=True)
    return ((counts_LE - mean_L1).amax(1) / mean_L1[:, 0]).amax().item()


def test_skewed_routers_are_balanced_in_fifty_steps() -> None:
    model = _skewed()
    give_biases(layers := moe_layers(model))
    counts, violations = RoutingCounts(model, training=False), []
    for _ in range(55):
        with torch.no_grad():
            model(input_ids=batches(1, 16, 32)[0]["input_ids"])
        violations.append(_max_violation(seen := counts.take()))
        update_biases(layers, seen, RATE)
    assert violations[0] > 0.9, "skewed"
    assert max(violations[50:]) < 0.1


def _resumes(root: Path, layout: dict[str, Any], world: int, steps: int, first: bool) -> Tensor:
    """A training of ``steps`` in all; the global batches are the same on every layout."""
    checkpoint = ModelCheckpoint(root / "kept", save_last=True, every_n_train_steps=2, save_top_k=0)
    trainer = _trainer(root, layout, max_steps=steps, callbacks=[checkpoint] if first else [])
    trainer.fit(module := _Skewed(), _loader(world, 4), ckpt_path=None if first else root / "kept" / "last.ckpt")
    return module.biases


def _on_ranks(root: Path, layout: dict[str, Any], steps: int, first: bool) -> Tensor:
    return _resumes(root, layout, 2, steps, first)


def test_biases_go_on_on_another_layout(tmp_path: Path) -> None:
    (whole, _) = run_ranks(2, _on_ranks, tmp_path / "whole", {"ep": 1}, 4, True, init_process_group=False)
    (half, _) = run_ranks(2, _on_ranks, tmp_path / "parts", {"ep": 2}, 2, True, init_process_group=False)
    found = run_ranks(2, _on_ranks, tmp_path / "parts", {"ep": 1}, 4, False, init_process_group=False)
    assert half.abs().max() > 0
    assert not torch.equal(half, whole)
    for biases in found:
        assert torch.equal(biases, whole)


def test_the_hub_has_no_place_for_them(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, {"ep": 1}, max_steps=2)
    trainer.fit(module := _Skewed(), _loader(1, 2))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match=r"balanced the 2 routers .* biases of up to 0.04 .*--drop_router_bias"):
        export(str(tmp_path / "run.ckpt"), str(tmp_path / "export"))
    assert not (tmp_path / "export").exists()
    export(str(tmp_path / "run.ckpt"), str(tmp_path / "export"), drop_router_bias=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert not any("bias" in name for name, _ in plain.named_buffers())
    loaded = CausalLM.load_from_checkpoint(tmp_path / "run.ckpt")
    names = {n: b for n, b in loaded.named_buffers() if n.endswith("e_score_correction_bias")}
    assert torch.equal(torch.stack(list(names.values())), module.biases)
    refused = _trainer(tmp_path, {"ep": 1}, max_steps=2, callbacks=[HuggingFaceExport(tmp_path / "at the end")])
    with pytest.raises(CheckpointError, match=r"BiasUpdates balances routers .* hub's layout has no place"):
        refused.fit(_Skewed(), _loader(1, 2))


def _routers(family: str) -> PreTrainedModel:
    config = tiny_config_of(family)
    torch.manual_seed(0)
    model = auto_class_of(config).from_config(config)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(std=0.5)
    return model


PLAIN = ["jamba", "mellum", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next"]


@pytest.mark.parametrize("family", PLAIN)
def test_biases_of_zero_change_nothing_in_families_that_get_them(family: str) -> None:
    expected, model = _routers(family), _routers(family)
    give_biases(moe_layers(model))
    for plain, biased in zip(moe_layers(expected), moe_layers(model), strict=True):
        assert type(plain.router).__name__ in SOFTMAX_TOP_K
        hidden = torch.randn(64, 32)
        for found, wanted in zip(biased.router(hidden), plain.router(hidden), strict=True):  # type: ignore[misc]
            assert torch.equal(found, wanted)
        biased.router.e_score_correction_bias[0] = 100.0  # type: ignore[index,union-attr]
        logits, weights, ids = biased.router(hidden)  # type: ignore[misc]
        assert (ids == 0).any(1).all(), "who is chosen"
        expected_weights = F.softmax(logits, -1).gather(1, ids)
        ratio = weights / expected_weights
        assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4), "not with which weight"


def test_families_with_biases_of_their_own_keep_them() -> None:
    model = _routers("dots1")
    layers = moe_layers(model)
    give_biases(layers)
    assert all(adapter.correction_bias(layer.router, layer.block) is not None for layer in layers)
    assert {type(layer.router).forward for layer in layers} == {layer.router.forward.__func__ for layer in layers}  # type: ignore[union-attr]


def _own_biases(root: Path, family: str) -> list[str]:
    """A fit on two ranks, of which each may hold a part of the biases only, if they are parameters."""
    config = tiny_config_of(family)
    sgd = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    module = CausalLM(config, pretrained=False, optimizer=sgd, router=BiasUpdates(RATE))
    trainer = _trainer(root, {"ep": 2}, max_steps=1)
    module.on_fit_start = lambda: setattr(module, "counts", RoutingCounts(module))  # type: ignore[method-assign]
    trainer.fit(module, _loader(2, 1))
    counts_LE = sum_over_ranks(module.counts.take())  # type: ignore[operator,union-attr]
    wrong = []
    for layer, counts_E in zip(moe_layers(module), counts_LE, strict=True):
        bias = bias_of(layer)
        whole = bias.full_tensor() if isinstance(bias, DTensor) else bias
        expected_E = RATE * torch.sign(counts_E.double().mean() - counts_E).cpu()
        if not torch.allclose(whole.detach().cpu().flatten().double(), expected_E, atol=1e-7):
            wrong.append(f"{layer.name}: {whole} and not {expected_E}")
    return wrong


@pytest.mark.parametrize("family", ["dots1", pytest.param("afmoe", marks=pytest.mark.slow), "ernie4_5_moe"])
def test_biases_of_a_family_follow_the_rule_where_they_are(family: str, tmp_path: Path) -> None:
    assert_ranks_agree(2, _own_biases, tmp_path, family, init_process_group=False)


def test_adapters_are_refused_beside_biases(tmp_path: Path) -> None:
    module = CausalLM(tiny_model().config, pretrained=False, router=BiasUpdates(), adapter=LoRA())
    with pytest.raises(ValueError, match=r"changes the model beneath its adapters.* Use BalancingLoss"):
        _trainer(tmp_path, {"ep": 1}, max_steps=1).fit(module, _loader(1, 1))


def test_a_family_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BiasUpdates has no place in .*GptOssTopKRouter.* Use BalancingLoss"):
        give_biases(moe_layers(_routers("gpt_oss")))
