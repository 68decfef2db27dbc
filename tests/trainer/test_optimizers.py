"""Optimizers, schedules, manual optimization, and modules beside the model, at ep=2."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers.optimization as transformers_optimization
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_ep.trainer.refusals import refuse_optimizers
from tests.ranks import device
from tests.reference import relative_error, tiny_model
from tests.rows import STEPS, WORLD, RowFailures, Rows, fit, refused, whole
from tests.tiny import SMALL, Samples, TinyModule, loader, quiet

row = Rows()


class WithValueHead(TinyModule):
    """An `nn.Linear` beside the transformers model, trained with it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = value_head()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return with_value_loss(self.model, self.head, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def value_head() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Linear(32, 1)


def with_value_loss(model: nn.Module, head: nn.Module, batch: Any) -> Tensor:
    output = model(input_ids=batch["input_ids"], labels=batch["labels"], output_hidden_states=True)
    return output.loss + (head(output.hidden_states[-1]) - 1).square().mean()


@row()
def value_head_outside_the_model(root: Path) -> None:
    module = WithValueHead()
    flags = {"use_distributed_sampler": False, "max_epochs": 1}
    quiet(root, **flags).fit(module, DataLoader(_Mine(2), batch_size=None))
    model, head = tiny_model(**SMALL), value_head()
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (with_value_loss(model, head, _batch(step, rank)) / WORLD).backward()
        optimizer.step()
    _equal(module.head, head)
    _equal(module.model, model)


def _batch(step: int, rank: int) -> dict[str, Tensor]:
    samples = [Samples(100)[10 * step + 2 * rank + i] for i in range(2)]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


class _Mine(torch.utils.data.Dataset):
    """The batches of this rank, one per step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return _batch(step, dist.get_rank())


def _equal(sharded: nn.Module, reference: nn.Module, tolerance: float = 1e-5) -> None:
    found, expected = dict(sharded.named_parameters()), dict(reference.named_parameters())
    assert found.keys() == expected.keys()
    errors = {name: relative_error(whole(found[name]), expected[name].detach()) for name in found}
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong


@row()
def trainable_parameter_on_the_module_is_refused(root: Path) -> None:
    class Bare(TinyModule):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    with refused("temperature", "diverge", "submodule"):
        fit(root, Bare())


@row()
def fused_and_foreach_optimizers(root: Path) -> None:
    wrong = {}
    for kind in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        for flag in ("foreach",) if kind is torch.optim.SGD else ("fused", "foreach"):

            class Chosen(WithValueHead):
                kind: Any
                flag: str

                def configure_optimizers(self) -> Any:
                    kwargs = {"momentum": 0.9} if self.kind is torch.optim.SGD else {}
                    return self.kind(self.parameters(), lr=1e-2, **{self.flag: True}, **kwargs)

            Chosen.kind, Chosen.flag = kind, flag
            module = Chosen()
            try:
                quiet(root, use_distributed_sampler=False, max_epochs=1).fit(
                    module, DataLoader(_Mine(2), batch_size=None)
                )
            except Exception as error:
                wrong[kind.__name__, flag] = f"{type(error).__name__}: {error}"
                continue
            model, head = tiny_model(**SMALL), value_head()
            params = [*model.parameters(), *head.parameters()]
            optimizer = kind(params, lr=1e-2, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
            for step in range(2):
                optimizer.zero_grad()
                for rank in range(WORLD):
                    (with_value_loss(model, head, _batch(step, rank)) / WORLD).backward()
                optimizer.step()
            # Adam's first steps are signs, which amplifies rounding where a gradient is nearly zero.
            _equal(module.head, head, 1e-3)
            _equal(module.model, model, 1e-3)
    assert not wrong, wrong


@row()
def optimizers_that_cannot_run_on_shards(root: Path) -> None:
    optim, transformers = torch.optim, transformers_optimization
    for kind, flags, words in (
        (optim.SGD, {"fused": True}, ["SGD", "fused=True", "foreach=True", "instead"]),
        (optim.Adagrad, {"fused": True}, ["Adagrad", "fused=True", "foreach=True", "instead"]),
        (optim.ASGD, {"foreach": True}, ["ASGD", "foreach=True", "Pass foreach=False"]),
        (optim.LBFGS, {}, ["LBFGS", "AdamW", "instead"]),
        (optim.Rprop, {}, ["Rprop", "AdamW", "instead"]),
        (optim.SparseAdam, {}, ["SparseAdam", "AdamW", "instead"]),
        (optim.Adafactor, {}, ["Adafactor", "AdamW", "instead"]),
        (transformers.Adafactor, {"relative_step": False}, ["Adafactor", "AdamW", "instead"]),
    ):
        module = TinyModule()
        module.configure_optimizers = lambda m=module, k=kind, f=flags: k(m.parameters(), lr=0.1, **f)  # type: ignore[method-assign]
        with refused(*words):
            fit(root, module)
        assert not module.losses, "before the first step"


@row()
def every_optimizer_of_torch_steps_as_on_one_process_or_is_refused(root: Path) -> None:
    """Three steps on the same gradients; the sharded ones bit for bit, since no optimizer mixes elements (but Muon)."""
    module = TinyModule()
    quiet(root, max_steps=1, use_distributed_sampler=False).fit(module, DataLoader(_Mine(1), batch_size=None))
    with_value_loss(module.model, value_head().to(device()), _batch(0, 0)).backward()
    kinds = [kind for _, kind in inspect.getmembers(torch.optim, inspect.isclass) if issubclass(kind, Optimizer)]
    kinds = [kind for kind in kinds if kind is not Optimizer]
    assert len(kinds) >= 14
    choices = [(k, flag) for k in kinds for flag in ("foreach", "fused") if flag in inspect.signature(k).parameters]
    wrong = {}
    for kind, flag in [*((kind, None) for kind in kinds), *choices]:
        if message := _steps_alike(kind, {} if flag is None else {flag: True}, module.model):
            wrong[kind.__name__, flag] = message
    assert not wrong, wrong


def _steps_alike(kind: Any, flags: dict[str, Any], model: nn.Module) -> str | None:
    params = [param for param in model.parameters() if kind is not torch.optim.Muon or param.ndim == 2]
    plain = [nn.Parameter(whole(param).to(device())) for param in params]
    for param, sharded in zip(plain, params, strict=True):
        param.grad = whole(sharded.grad).to(device())
    optimizer, reference = kind(params, lr=1e-2, **flags), kind(plain, lr=1e-2, **flags)
    try:
        refuse_optimizers([optimizer])
    except ValueError:
        return None
    with pytest.MonkeyPatch.context() as patch:
        # Muon iterates in bf16, where another order of additions is another direction.
        patch.setattr(torch.Tensor, "bfloat16", lambda self: self)
        try:
            for _ in range(3):
                optimizer.step()
                reference.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    errors = [relative_error(whole(a), b.detach()) for a, b in zip(params, plain, strict=True)]
    return None if all(error <= 1e-6 for error in errors) else f"relative errors {errors}"


class Manual(WithValueHead):
    """Two optimizers, stepped by hand, one clipped, each with its own loss."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.norms: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for index, optimizer in enumerate(self.optimizers()):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            loss = with_value_loss(self.model, self.head, batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            if index == 0:
                params = [param for group in optimizer.param_groups for param in group["params"]]
                self.norms.append(self.trainer.strategy.clip_grad_norm_(params, 0.5).item())
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1), torch.optim.SGD(self.head.parameters(), lr=0.1)


def _manual_reference() -> tuple[nn.Module, nn.Module, list[float]]:
    model, head, norms = tiny_model(**SMALL), value_head(), []
    first, second = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(head.parameters(), lr=0.1)
    for step in range(2):
        for optimizer in (first, second):
            model.zero_grad()
            head.zero_grad()
            for rank in range(WORLD):
                (with_value_loss(model, head, _batch(step, rank)) / WORLD).backward()
            if optimizer is first:
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.step()
    return model, head, norms


@row()
def manual_optimization(root: Path) -> None:
    _manual(root, toggle=False, zero_all=True)


@row()
def manual_optimization_toggled(root: Path) -> None:
    _manual(root, toggle=True, zero_all=False)


def _manual(root: Path, toggle: bool, zero_all: bool) -> None:
    module = Manual(toggle)
    if zero_all:
        module.on_before_zero_grad = lambda _: module.zero_grad()  # type: ignore[method-assign]
    trainer = quiet(root, use_distributed_sampler=False, max_epochs=1)
    trainer.fit(module, DataLoader(_Mine(2), batch_size=None))
    model, head, norms = _manual_reference()
    assert module.norms == pytest.approx(norms, rel=1e-5), (module.norms, norms)
    _equal(module.head, head)
    _equal(module.model, model)


@row()
def toggled_parameters_get_no_gradient(root: Path) -> None:
    found: list[list[str]] = []

    class Watched(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.toggle_optimizer(second)
            second.zero_grad()
            first.zero_grad()
            self.manual_backward(with_value_loss(self.model, self.head, batch))
            found.append([name for name, param in self.named_parameters() if param.grad is not None])
            self.untoggle_optimizer(second)

    quiet(root, use_distributed_sampler=False, max_epochs=1).fit(Watched(True), DataLoader(_Mine(2), batch_size=None))
    assert found[0] == found[1] == ["head.weight", "head.bias"], found


@row()
def lr_scheduler(root: Path) -> None:
    class Scheduled(TinyModule):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    trainer, _ = fit(root, Scheduled())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.5**STEPS


@row()
def torch_compile_of_the_module(root: Path) -> None:
    with refused("compile"):
        quiet(root, max_steps=1).fit(torch.compile(TinyModule()), loader())


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
