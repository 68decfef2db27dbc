"""lightning_ep.AdamW is torch's optimizer: the same weights, states and clipping, whatever dtype gradients come in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_ep
from lightning_ep.ops import kernels
from tests.reference import relative_error
from tests.rows import RowFailures, Rows, whole
from tests.tiny import TinyModule, loader, quiet

row = Rows()
EXPERTS = ("gate_up_proj", "down_proj")


class Module(TinyModule):
    """A user's module with the optimizer of the row; keeps the dtypes of the experts' gradients."""

    def __init__(self, kind: type, **overrides: Any) -> None:
        super().__init__(**overrides)
        self.kind = kind
        self.dtypes: set[torch.dtype] = set()
        self.others: set[torch.dtype] = set()

    def configure_optimizers(self) -> Any:
        fused = {} if self.kind is lightning_ep.AdamW else {"fused": True}
        # A large eps: else the first steps are signs, which amplify the noise of a GPU where a gradient is nearly zero.
        return self.kind(self.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.1, **fused)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for name, param in self.model.named_parameters():
            (self.dtypes if name.endswith(EXPERTS) else self.others).add(param.grad.dtype)


class TwoForwards(Module):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.5 * self.loss({k: v.flip(0) for k, v in batch.items()})


class ByHand(Module):
    def __init__(self, kind: type, **overrides: Any) -> None:
        super().__init__(kind, **overrides)
        self.automatic_optimization = False


class Manual(ByHand):
    """Clips the sum of two backward passes; gives one of the steps up."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for scale in (1.0, 0.5):
            self.manual_backward(scale * super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 0.05, "norm")
        if batch_idx == 0:
            optimizer.zero_grad()  # the step is given up, and with it what was to be multiplied
            self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class KeepsDtypesAfterSteps(Module):
    """Of the experts' gradients."""

    def on_train_batch_end(self, *_: Any) -> None:
        named = self.model.named_parameters()
        self.others = {param.grad.dtype for name, param in named if name.endswith(EXPERTS)}


class OwnClipping(Module):
    """Clips by norm, looks at the result, and clips it once more by value."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.05, "norm")
        norm = lightning_ep.clip_grad_norm_(self.parameters(), float("inf"))
        assert norm <= 0.0501, norm
        self.clip_gradients(optimizer, 0.001, "value")


class ManualAccumulation(ByHand):
    """Clips what each backward leaves, then adds to it."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for scale in (1.0, 0.5):
            self.manual_backward(scale * super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, 0.05, "norm")
        optimizer.step()


class AddsInHook(Module):
    """Adds gradients of a second loss where nobody expects it."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batch = batch
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        self.loss({k: v.flip(0) * 2 // 3 for k, v in self.batch.items()}).backward()


def _trained(root: Path, module: Module, **flags: Any) -> Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "LARGE", 0)  # on a GPU the kernel takes all parameters
        quiet(root, max_epochs=1, precision="bf16-mixed", **flags).fit(module, loader(12))
    return module


def _compare(root: Path, cls: type[Module] = Module, tolerance: float = 2e-6, **flags: Any) -> Module:
    """Weights after three steps are those of torch's optimizer; returns our module."""
    L.seed_everything(1)
    ours = _trained(root, cls(lightning_ep.AdamW), **flags)
    L.seed_everything(1)
    theirs = _trained(root, cls(torch.optim.AdamW), **flags)
    assert theirs.dtypes <= {torch.float32}
    for (name, found), expected in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        error = relative_error(whole(found), whole(expected))
        assert error <= (tolerance if found.is_cuda or flags.get("gradient_clip_val") else 0), (name, error)
    return ours


@row()
def one_gradient_keeps_the_dtype_of_its_gemms(root: Path) -> None:
    ours = _compare(root)
    assert ours.dtypes == {torch.bfloat16}
    assert ours.others == {torch.float32}


@row()
def clipped_by_norm(root: Path) -> None:
    ours = _compare(root, KeepsDtypesAfterSteps, gradient_clip_val=0.05)
    assert ours.dtypes == {torch.bfloat16}
    assert ours.others == {torch.bfloat16}, "the step clipped, not a pass before it"


@row()
def clipped_by_value(root: Path) -> None:
    _compare(root, gradient_clip_val=0.001, gradient_clip_algorithm="value")


@row()
def gradients_that_are_added_are_wide(root: Path) -> None:
    assert _compare(root, TwoForwards).dtypes == {torch.float32}
    assert _compare(root, accumulate_grad_batches=2).dtypes == {torch.float32}


@row()
def manual_optimization(root: Path) -> None:
    module = _compare(root, Manual, gradient_clip_val=None)
    assert {param.grad.dtype for param in module.parameters()} == {torch.float32}


@row()
def clipped_by_the_module_itself(root: Path) -> None:
    _compare(root, OwnClipping)


@row()
def clipped_before_more_is_added(root: Path) -> None:
    _compare(root, ManualAccumulation)


@row()
def goes_on_after_fit(root: Path) -> None:
    module = Module(lightning_ep.AdamW)
    trainer = quiet(root, max_epochs=1, precision="bf16-mixed")
    trainer.fit(module, loader(4))
    trainer.validate(module, loader(4), verbose=False)
    module.kind = torch.optim.AdamW
    module.dtypes.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(4))
    assert module.dtypes == {torch.float32}
    module.to("cpu")


@row()
def gradients_are_added_in_a_hook(root: Path) -> None:
    assert _compare(root, AddsInHook).dtypes == {torch.float32}


@row()
def experts_that_fsdp_reduces(root: Path) -> None:
    strategy = lightning_ep.ExpertParallelStrategy
    L.seed_everything(1)
    ours = _trained(root, Module(lightning_ep.AdamW), strategy=strategy(ep=1), gradient_clip_val=0.05)
    L.seed_everything(1)
    theirs = _trained(root, Module(torch.optim.AdamW), strategy=strategy(ep=1), gradient_clip_val=0.05)
    assert ours.dtypes == {torch.float32}
    for found, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert relative_error(whole(found), whole(expected)) < 2e-6


@pytest.mark.parametrize("name", row)
def test_equals_torch(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)


def _steps(optimizer: torch.optim.Optimizer, params: list[Tensor], seed: int, number: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("flags", [{}, {"fused": True}, {"foreach": True}], ids=["plain", "fused", "foreach"])
@pytest.mark.parametrize("first_is_ours", [True, False])
def test_goes_on_from_the_other_state(first_is_ours: bool, flags: dict[str, bool]) -> None:
    start = [torch.randn(5, 3), torch.randn(4)]

    def build(ours: bool) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        params = [tensor.clone().requires_grad_() for tensor in start]
        groups = [{"params": params[:1], "weight_decay": 0.3}, {"params": params[1:]}]
        return (lightning_ep.AdamW(groups, 0.1) if ours else torch.optim.AdamW(groups, 0.1, **flags)), params

    through, reference = build(first_is_ours), build(False)
    for optimizer, params in (through, reference):
        _steps(optimizer, params, seed=1)
    onward = build(not first_is_ours)
    for param, before in zip(onward[1], through[1], strict=True):
        param.data.copy_(before)
    onward[0].load_state_dict(copy.deepcopy(through[0].state_dict()))
    for optimizer, params in (onward, reference):
        _steps(optimizer, params, seed=2)
    for found, expected in zip(onward[1], reference[1], strict=True):
        assert relative_error(found.detach(), expected.detach()) < 1e-6


def test_refuses_states_that_it_would_not_follow() -> None:
    param = torch.randn(3).requires_grad_()
    state = torch.optim.AdamW([param], amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad"):
        lightning_ep.AdamW([param]).load_state_dict(state)


def test_a_copy_has_no_pending_factor() -> None:
    param = torch.ones(3).requires_grad_()
    optimizer = lightning_ep.AdamW([param], lr=0.1)
    optimizer.multiply_gradients(torch.tensor(0.0))
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    for each, p in ((optimizer, param), (other, copied)):
        p.grad = torch.ones(3)
        each.step()
    assert torch.equal(param.detach(), torch.full((3,), 1 - 0.1 * 0.01))  # a gradient of zero: decay alone
    assert not torch.equal(copied.detach(), param.detach())


def test_refuses_groups_that_it_would_not_follow() -> None:
    groups = [{"params": [torch.randn(3).requires_grad_()], "maximize": True}]
    with pytest.raises(ValueError, match="maximize"):
        lightning_ep.AdamW(groups)
    optimizer = lightning_ep.AdamW([torch.randn(3).requires_grad_()])
    with pytest.raises(ValueError, match="amsgrad"):
        optimizer.add_param_group({"params": [torch.randn(3).requires_grad_()], "amsgrad": True})
    assert len(optimizer.param_groups) == 1


def test_a_loaded_state_leaves_gradients_as_they_are() -> None:
    param = torch.ones(3).requires_grad_()
    optimizer = lightning_ep.AdamW([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.multiply_gradients(torch.tensor(0.0))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 1 - 0.1 * 0.01))  # a gradient of zero: decay alone


def test_steps_with_a_gradient_scaler() -> None:
    """The scaler divides the gradients itself, and leaves steps out whose gradients are not finite."""
    found = []
    for kind in (lightning_ep.AdamW, torch.optim.AdamW):
        param = torch.ones(3).requires_grad_()
        optimizer, scaler = kind([param], lr=0.1, eps=1.0), torch.amp.GradScaler("cpu", init_scale=1024.0)
        for weight in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale(weight * param.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(param.detach())
    assert relative_error(*found) < 1e-6


class OwnHook(lightning_ep.CausalLM):
    def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None:
        super().configure_gradient_clipping(*arguments, **named)


@pytest.mark.parametrize("kind", [lightning_ep.AdamW, torch.optim.SGD])
@pytest.mark.parametrize(("bound", "expected"), [(0.5, 0.5), (-1.0, 5.0), (None, 5.0)])
def test_causal_lm_clips_before_a_hook_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bound: Any, expected: float, kind: Any
) -> None:
    """Also by a bound below zero, which Lightning takes for none."""
    module = OwnHook({"model_type": "qwen3_moe"}, pretrained=False)
    module.trainer = quiet(tmp_path, strategy=lightning_ep.ExpertParallelStrategy(), accelerator="cpu", devices=1)
    monkeypatch.setattr(module, "log", lambda *arguments, **named: None)
    param = torch.zeros(2).requires_grad_()
    param.grad = torch.tensor([3.0, -4.0])
    module.configure_gradient_clipping(kind([param]), bound)
    assert param.grad.norm().item() == pytest.approx(expected)


def test_parameters_of_several_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch._fused_adamw_

    def as_on_gpus(params: list[Tensor], *others: Any, **numbers: Any) -> None:
        assert len({param.dtype for param in params}) == 1, "params must have same dtype, device, and layout"
        fused(params, *others, **numbers)

    monkeypatch.setattr(torch, "_fused_adamw_", as_on_gpus)
    start = [torch.randn(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32)]
    found = []
    for build in (lightning_ep.AdamW, lambda params: torch.optim.AdamW(params, fused=True)):
        params = [tensor.clone().requires_grad_() for tensor in start]
        for param in params:
            param.grad = torch.ones_like(param)
        build(params).step()
        found.append([param.detach() for param in params])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clips_gradients_in_float64(norm_type: float) -> None:
    params = [torch.zeros(3, dtype=torch.float64).requires_grad_() for _ in range(2)]
    for param in params:
        param.grad = torch.tensor([3.0, -4.0, 1e30], dtype=torch.float64)
    expected = torch.nn.utils.get_total_norm([param.grad for param in params], norm_type)
    assert lightning_ep.clip_grad_norm_(params, 1.0, norm_type).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.nn.utils.get_total_norm([param.grad for param in params], norm_type).item() == pytest.approx(1.0)
