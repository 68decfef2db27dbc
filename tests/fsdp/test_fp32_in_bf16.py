"""What families ask to be fp32 in bf16 (`_keep_in_fp32_modules_strict` of transformers) is, in compute and storage."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import ConcatDataset, DataLoader
from transformers import PreTrainedModel

from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, from_pretrained
from lightning_ep import transformers_adapter as adapter
from lightning_ep.fsdp.state import groups_of, roots
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.ranks import device
from tests.reference import family_model
from tests.rows import RowFailures, Rows, agreed, whole
from tests.tiny import Samples, TinyModule, loader, quiet

row = Rows()
BF16, FP32 = torch.bfloat16, torch.float32


def _saved(root: Path, family: str) -> Path:
    """Where rank 0 has saved a model of that family in fp32, with weights large enough to see."""
    if not dist.is_initialized():
        quiet(root).validate(TinyModule(), loader(4), verbose=False)  # starts the process group
    if dist.get_rank() == 0:
        config = tiny_config_of(family)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = auto_class_of(config).from_config(config)
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=0.1)
        model.save_pretrained(root / family)
    dist.barrier()
    return root / family


class Module(TinyModule):
    """Trains what `build` gives, and notes the dtype and value of every parameter as its forward sees it."""

    def __init__(self, build: Any, optimizer: Any = None) -> None:
        super().__init__()
        self.build, self.optimizer = build, optimizer
        self.seen_dtypes: dict[str, torch.dtype] = {}
        self.seen: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        note = not self.seen

        def look(name: str, module: nn.Module) -> None:
            for key, param in module.named_parameters(recurse=False):
                full = f"{name}.{key}"
                local = param.to_local() if isinstance(param, DTensor) else param
                self.seen_dtypes[full] = local.dtype
                if param.numel() < 4096 and "experts" not in name:
                    self.seen[full] = local.detach().clone()

        hooks = [
            module.register_forward_pre_hook(lambda module, _, name=name: look(name, module))
            for name, module in self.model.named_modules()
            if note and next(module.parameters(recurse=False), None) is not None
        ]
        loss = self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        for hook in hooks:
            hook.remove()
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        named = self.model.named_parameters()
        self.gradients = {name: whole(param.grad) for name, param in named if param.grad is not None}
        dense = [param for name, param in self.model.named_parameters() if "experts" not in name]
        assert all(param.grad.dtype == param.dtype for param in dense if param.grad is not None)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer or (lambda params: torch.optim.SGD(params, lr=0.1))
        return optimizer(self.parameters())


def _same(times: int) -> DataLoader:
    """The first batch, again and again, for every rank."""
    return DataLoader(ConcatDataset([Samples(2)] * times), batch_size=2)


def _fit(root: Path, module: L.LightningModule, precision: Any, steps: int = 1, **overrides: Any) -> Any:
    trainer = quiet(root, precision=precision, max_steps=steps, use_distributed_sampler=False, **overrides)
    trainer.fit(module, _same(8))
    assert trainer.global_step == steps
    return module


def _reference(path: Path, family: str, dtype: torch.dtype) -> tuple[PreTrainedModel, float, dict[str, Tensor]]:
    """What plain transformers computes with the weights loaded in a dtype: loss and gradients of the first batch."""
    model = auto_class_of(tiny_config_of(family)).from_pretrained(path, dtype=dtype)
    model.set_experts_implementation("eager")
    model.train().to(device())
    batch = {name: value.to(device()) for name, value in next(iter(loader())).items()}
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    loss.backward()
    grads = {name: param.grad.float().cpu() for name, param in model.named_parameters() if param.grad is not None}
    return model, loss.item(), grads


def _check(root: Path, family: str, wider: str = r"(?!)", **strategy: Any) -> None:
    """Against plain transformers in bf16, but for parameters that are kept wider than there."""
    path = _saved(root, family)
    in_bf16, loss, grads = _reference(path, family, BF16)
    plain, exact_loss, exact = _reference(path, family, FP32)
    weights = dict(plain.named_parameters(remove_duplicate=False))
    dtypes = {name: param.dtype for name, param in in_bf16.named_parameters(remove_duplicate=False)}
    assert not any(dtype == FP32 for name, dtype in dtypes.items() if re.search(wider, name)), "plain is as wide"
    dtypes = {name: FP32 if re.search(wider, name) else dtype for name, dtype in dtypes.items()}
    for precision in ("bf16-mixed", "bf16-true"):
        arguments = {"ep": 1, **strategy}
        build = lambda: from_pretrained(path, auto_class_of(tiny_config_of(family)), attn_implementation="eager")  # noqa: E731
        module = _fit(root, Module(build), precision, strategy=ExpertParallelStrategy(**arguments))
        stored = {name: param.dtype for name, param in module.model.named_parameters(remove_duplicate=False)}
        assert stored == (dtypes if precision == "bf16-true" else dict.fromkeys(dtypes, FP32)), precision
        computed = {name: dtype for name, dtype in module.seen_dtypes.items() if "experts" not in name}
        assert {FP32, BF16} == set(computed.values()), "the family must ask for it"
        assert computed == {name: dtypes[name] for name in computed}, precision
        for name, value in module.seen.items():
            assert torch.equal(value, weights[name].detach().to(dtypes[name])), f"{name}, {precision}"
        losses = (module.losses[0], loss, exact_loss)
        assert abs(losses[0] - exact_loss) <= 3 * abs(loss - exact_loss) + 1e-2, (precision, losses)
        for name, grad in exact.items():
            if grad.norm() < 1e-7:
                continue  # what cancels: hash routers of tiny models name one expert twice
            found, close = _error(module.gradients[name].float(), grad), _error(grads[name], grad)
            # Where bf16 alone is far off (a token that changed its experts) nothing can be said.
            assert close > 0.3 or found <= 3 * close + 0.05, f"{name}, {precision}: {found:.3f}, {close:.3f}"
        assert agreed([whole(param).float().sum().item() for param in module.model.parameters()])


def _error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-6)).item()


@row()
def parameters_of_attention_and_routers(root: Path) -> None:
    _check(root, "flint")
    _check(root, "flint", ep=2)


@row()
def norms_and_connections_between_layers_and_the_head(root: Path) -> None:
    _check(root, "deepseek_v4")


@row(slow=True)
def the_same_of_another_family(root: Path) -> None:
    _check(root, "hy_v4")


@row()
def norms_that_a_family_asks_for_though_transformers_heeds_it_in_fp16_only(root: Path) -> None:
    _check(root, "gpt_oss", wider="norm")


@row()
def by_a_dtype_in_the_code(root: Path) -> None:
    _check(root, "hunyuan_v1_moe")


@row()
def under_recompute(root: Path) -> None:
    _check(root, "ernie4_5_moe", activation_checkpointing="full")


def _built(family: str) -> PreTrainedModel:
    sizes = tiny_config_of(family).to_dict()
    del sizes["model_type"]
    return family_model(family, sizes)


def _trains(root: Path, family: str) -> None:
    path = _saved(root, family)
    (_, exact, _), (_, loss, _) = (_reference(path, family, dtype) for dtype in (FP32, BF16))
    for precision in ("bf16-mixed", "bf16-true"):
        build = partial(from_pretrained, path, attn_implementation="eager")
        module = _fit(root, Module(build), precision, steps=3)
        found = module.losses
        assert abs(found[0] - exact) <= 3 * abs(loss - exact) + 0.02, (family, precision, found, exact, loss)
        assert found[-1] < found[0], (family, precision, found)


@row()
def a_family_whose_forward_needs_it_trains_in_bf16(root: Path) -> None:
    _trains(root, "minimax")


@row(slow=True)
def another_family_whose_forward_needs_it_trains_in_bf16(root: Path) -> None:
    _trains(root, "inkling2_text")


@row()
def sums_of_windows_and_every_optimizer(root: Path) -> None:
    _sums_of_windows_and_every_optimizer(root, "bf16-mixed")


@row(slow=True)
def the_same_of_parameters_in_bf16(root: Path) -> None:
    _sums_of_windows_and_every_optimizer(root, "bf16-true")


def _sums_of_windows_and_every_optimizer(root: Path, precision: str) -> None:
    """Gradients of a window are summed in fp32 whatever the parameter; optimizers take shards of two dtypes."""
    path = _saved(root, "flint")
    build = partial(from_pretrained, path, attn_implementation="eager")
    once = _fit(root, Module(build), precision)
    # A window over one batch twice is that batch.
    twice = Module(build)
    trainer = quiet(root, precision=precision, max_steps=1, accumulate_grad_batches=2, use_distributed_sampler=False)
    trainer.fit(twice, _same(2))
    for name, grad in once.gradients.items():
        assert _error(twice.gradients[name].float(), grad.float()) < 1e-2, (name, precision)
    for optimizer in (AdamW, partial(torch.optim.AdamW, foreach=True)):
        module = _fit(root, Module(build, partial(optimizer, lr=1e-2)), precision, steps=3, gradient_clip_val=0.5)
        assert module.losses[-1] < module.losses[0], (optimizer, precision)


@row()
def a_fused_loss_on_a_head_in_fp32(root: Path) -> None:
    path = _saved(root, "hy_v4")
    _, expected, _ = _reference(path, "hy_v4", FP32)
    for precision in ("bf16-mixed", "bf16-true"):
        module = CausalLM(str(path), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
        trainer = quiet(root, precision=precision, max_steps=2, use_distributed_sampler=False)
        trainer.fit(module, _same(2))
        assert module.model.lm_head.weight.dtype == FP32
        assert trainer.callback_metrics["train/loss"].item() < expected + 5e-3, precision


@row()
def a_run_in_bf16_that_goes_on(root: Path) -> None:
    path = _saved(root, "flint")
    build = partial(from_pretrained, path, attn_implementation="eager")
    optimizer = partial(AdamW, lr=1e-2)
    whole_run = _fit(root, Module(build, optimizer), "bf16-true", steps=3)
    first = Module(build, optimizer)
    trainer = quiet(root, precision="bf16-true", max_steps=2, use_distributed_sampler=False)
    trainer.fit(first, _same(8))
    trainer.save_checkpoint(root / "checkpoint")
    second = Module(build, optimizer)
    trainer = quiet(root, precision="bf16-true", max_steps=3, use_distributed_sampler=False)
    trainer.fit(second, _same(8), ckpt_path=root / "checkpoint")
    for (name, param), other in zip(second.named_parameters(), whole_run.parameters(), strict=True):
        assert param.dtype == other.dtype, name
        assert torch.equal(whole(param), whole(other)), name


@row()
def families_that_ask_for_nothing_are_left_alone(root: Path) -> None:
    module = _fit(root, TinyModule(), "bf16-mixed")
    assert not adapter.fp32_parameters(module.model)
    for group in (group for state in roots(module) for group in groups_of(state)):
        assert all("init_dtype_attrs" not in vars(param) for param in group.fsdp_params)


@pytest.mark.parametrize("name", row)
def test_is_fp32_where_transformers_has_it(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
