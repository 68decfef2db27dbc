"""The parity harness: three steps through the Trainer on W ranks, compared with one process that runs no code of ours.

The losses, each gradient of the first step, the gradient norms and the weights after three steps of SGD.
"""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from lightning_ep import CausalLM, ExpertParallelStrategy, LoRA, add_adapter
from lightning_ep import loss as loss_module
from lightning_ep.fsdp import groups as layer_groups
from lightning_ep.transformers_adapter import recall
from tests.ranks import accelerator, assert_ranks_agree
from tests.reference import Trace, adapted_by_peft, batches, relative_error, tiny_config, tiny_model, train

STEPS, LR = 3, 0.5


class ShardSGD(torch.optim.SGD):
    """torch's SGD on shards as plain tensors: on every mesh, DTensor works out anew how each shape of them is added.

    That is a fifth of a run on meshes of three dimensions; ``stock`` cases have torch's own.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _shard(param).add_(_shard(param.grad), alpha=-group["lr"])
        return loss


def _shard(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class UserModule(L.LightningModule):
    """What a user has: a plain transformers model, the mean loss that it returns, one word on parallelism (for cp)."""

    def __init__(self, lora: LoRA | None = None, sgd: Any = torch.optim.SGD, **overrides: Any) -> None:
        super().__init__()
        self.sgd = sgd
        self.overrides = overrides
        self.lora = lora
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            # Rank 0's weights count; a seed per rank shows that they reach the others.
            rank = dist.get_rank() if dist.is_initialized() else 0
            self.model = _adapted(tiny_model(seed=rank, **self.overrides), self.lora)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.strategy.layout.cp > 1:
            batch = self.trainer.strategy.shard_sequence(batch)
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return self.sgd(self.parameters(), lr=LR)


class SeededCausalLM(CausalLM):
    """CausalLM with the reference's weights in memory."""

    def configure_model(self) -> None:
        if self.model is None:
            self.model = _adapted(tiny_model(**self.overrides), self._adapter)


def _adapted(model: Any, lora: LoRA | None) -> Any:
    """As `tests.reference.adapted_by_peft`, by what users call; other values on other ranks than the first."""
    if lora is None:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
        return add_adapter(model, lora)


def lora_like_peft(where: str, **options: Any) -> LoRA:
    """What adapts as `tests.reference.adapted_by_peft` does."""
    modules = [] if where == "experts" else None
    experts = where != "attention"
    same: dict[str, Any] = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
    return LoRA(**{**same, "target_modules": modules, "experts": experts, **options})


def as_peft(name: str, tensor: Tensor) -> Tensor:
    """A factor of experts as PEFT's files hold it."""
    if tensor.ndim != 3 or ".lora_" not in name:
        return tensor
    if ".lora_A." in name:
        return torch.cat(list(tensor))  # rows of one expert after the other
    return torch.stack([tensor[e, :, r] for r in range(tensor.shape[2]) for e in range(tensor.shape[0])], dim=1)


class Recorder(L.Callback):
    """Keeps what `tests.reference.train` keeps, as full tensors."""

    def __init__(self) -> None:
        self.trace = Trace(losses=[], norms=[], grads={}, weights={})

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.micro_losses: list[float] = []

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        self.micro_losses.append(loss.item())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if not self.trace["grads"]:
            self.trace["grads"] = {
                name: as_peft(name, param.grad.full_tensor()).cpu().clone()
                for name, param in module.model.named_parameters()
                if param.requires_grad
            }
        norm = trainer.strategy.clip_grad_norm_(max_norm=float("inf"))
        self.trace["norms"].append(norm.item())
        loss = torch.tensor(sum(self.micro_losses), device=norm.device, dtype=torch.float64)
        if isinstance(module, CausalLM):
            self.trace["losses"].append(module._train_loss.item())
        else:
            dist.all_reduce(loss)
            self.trace["losses"].append(loss.item() / trainer.world_size)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.trace["weights"] = {
            name: as_peft(name, param.detach().full_tensor()).cpu().clone()
            for name, param in module.model.named_parameters()
        }


class Batches(Dataset):
    """Batches that are made already."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


def _windows(world: int, accumulate: int, padded: bool, length: int) -> list[list[dict[str, Tensor]]]:
    flat = batches(STEPS * accumulate * world, size=2, length=length, padded=padded)
    size = accumulate * world
    return [flat[i * size : (i + 1) * size] for i in range(STEPS)]


def _fit(
    layout: dict[str, int],
    causal: bool,
    accumulate: int,
    clip: float | None,
    precision: str = "32-true",
    implementation: str = "fused",
    compile: str | None = None,
    recompute: Any = "none",
    overrides: dict[str, Any] | None = None,
    length: int = 12,
    grouped_parameters: int | None = None,
    adapter: str | None = None,
    stock: bool = False,
) -> Trace:
    torch.use_deterministic_algorithms(False)
    strategy = ExpertParallelStrategy(
        **layout, experts_implementation=implementation, compile=bool(compile), activation_checkpointing=recompute
    )
    overrides = overrides or {}
    lora = None if adapter is None else lora_like_peft(adapter)
    sgd = torch.optim.SGD if stock else ShardSGD
    module: Any = UserModule(lora, sgd, **overrides)
    if causal:
        optimizer = functools.partial(sgd, lr=LR)
        module = SeededCausalLM(tiny_config(), pretrained=False, optimizer=optimizer, adapter=lora)
        module.overrides = overrides
    recorder = Recorder()
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        if grouped_parameters is not None:
            patch.setattr(layer_groups, "_GROUPED_PARAMETERS", grouped_parameters)
        if compile is not None:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile))
        trainer = L.Trainer(
            strategy=strategy,
            accelerator=accelerator(),
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            num_nodes=_world() // int(os.environ["LOCAL_WORLD_SIZE"]),
            precision=precision,
            max_steps=STEPS,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=root,
        )
        world, rank = strategy.data_world_size, strategy.data_rank
        mine = [w[i * world + rank] for w in _windows(world, accumulate, causal, length) for i in range(accumulate)]
        trainer.fit(module, DataLoader(Batches(mine), batch_size=None))
    head = recall(module.model, loss_module._Head) if causal else None
    assert not causal or (head is not None and head.gives_the_logits), "the loss fell back to all logits"
    return recorder.trace


def _world() -> int:
    return int(os.environ["WORLD_SIZE"])


def _compare(trace: Trace, expected: Trace, tolerance: float, bf16: bool = False) -> list[str]:
    wrong = []
    for step in range(STEPS):
        for what in ("losses", "norms"):
            # A step without a valid token has a loss of zero.
            error = abs(trace[what][step] - expected[what][step]) / (abs(expected[what][step]) or 1.0)
            if not error <= tolerance:
                wrong.append(f"{what}[{step}] {trace[what][step]} != {expected[what][step]}")
    for what in ("grads", "weights"):
        assert trace[what].keys() == expected[what].keys()
        for name, value in expected[what].items():
            error = relative_error(trace[what][name], value)
            # In bf16 a near-tie in the router may send a token elsewhere: a single matrix moves more than the whole.
            if not error <= (10 * tolerance if bf16 else tolerance):
                wrong.append(f"{what} of {name}: relative error {error:.2e}")
    return wrong


def assert_trains_like_one_process(
    world: int, layout: dict[str, int], cases: list[dict[str, Any]], timeout: float = 90.0
) -> None:
    """Runs the cases on ``world`` ranks and in this process, without any code of ours.

    Args:
        world: Number of ranks.
        layout: Arguments of ExpertParallelStrategy.
        cases: ``causal`` (CausalLM, or a user's module), ``accumulate`` and ``clip``, and what else `_fit` takes.
        timeout: As in `run_ranks`.
    """
    data_ranks = world // (layout.get("tp", 1) * layout.get("cp", 1))
    expected = [_one_process(data_ranks, case) for case in cases]
    assert_ranks_agree(world, _differences, layout, cases, expected, init_process_group=False, timeout=timeout)


def compare_with_one_process(layout: dict[str, int], cases: list[dict[str, Any]]) -> list[str]:
    """What differs on this rank, which trains the one process, too: for ranks that somebody else has started."""
    data_ranks = _world() // (layout.get("tp", 1) * layout.get("cp", 1))
    return _differences(layout, cases, [_one_process(data_ranks, case) for case in cases])


def _one_process(data_ranks: int, case: dict[str, Any]) -> Trace:
    causal, length, overrides = case["causal"], case.get("length", 12), case.get("overrides", {})
    of_model = _hashable(overrides), case.get("adapter")
    trace = _reference(data_ranks, causal, case["accumulate"], case["clip"], length, *of_model)
    if case["clip"] is not None:
        assert trace["norms"][0] > 1.5 * case["clip"], "the bound must bite"
    return trace


def _hashable(overrides: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in overrides.items())


@functools.cache  # many layouts are compared with the same
def _reference(
    data_ranks: int,
    causal: bool,
    accumulate: int,
    clip: float | None,
    length: int,
    overrides: tuple[Any, ...],
    adapter: str | None,
) -> Trace:
    model = tiny_model(**{name: list(value) if isinstance(value, tuple) else value for name, value in overrides})
    if adapter is not None:
        model = adapted_by_peft(model, adapter)
    return train(model, _windows(data_ranks, accumulate, causal, length), LR, clip, token_weighted=causal)


def _differences(layout: dict[str, int], cases: list[dict[str, Any]], expected: list[Trace]) -> list[str]:
    wrong = []
    for case, one_process in zip(cases, expected, strict=True):
        bf16 = case.get("precision", "32-true") != "32-true"
        found = _compare(_fit(layout, **case), one_process, 3e-2 if bf16 else 1e-5, bf16)
        wrong += [f"{case}: {message}" for message in found]
    return wrong
