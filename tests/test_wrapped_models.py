"""CausalLM around modules that hold the transformers model: losses, gradients and evaluation are one process's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_ep import CausalLM, ExpertParallelStrategy
from lightning_ep import loss as loss_module
from lightning_ep import transformers_adapter as adapter
from tests.ranks import device
from tests.reference import batches, grad_or_zero, relative_error, tiny_config, tiny_model
from tests.rows import RowFailures, Rows, refused, whole
from tests.tiny import quiet

row = Rows()
STEPS, LR = 2, 0.3


class _Holder(nn.Module):
    """Passes everything on to a module of any name."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.anything = held

    def forward(self, **inputs: Any) -> Any:
        return self.anything(**inputs)


class _Louder(_Holder):
    """Has a forward of its own, which calls the embedding first."""

    def forward(self, input_ids: Tensor) -> Any:  # type: ignore[override]
        embeddings = self.anything.get_input_embeddings()(input_ids)
        return self.anything(inputs_embeds=embeddings * 1.5)


class _Cooler(_Holder):
    """Changes the logits, which it returns by themselves, and has parameters of its own."""

    def __init__(self, held: Any) -> None:
        super().__init__(held)
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.scale.weight, 0.7)

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.scale(self.anything(input_ids).logits.unsqueeze(-1)).squeeze(-1)


class _Watching(_Holder):
    """Looks at logits and returns them as they are."""

    def forward(self, **inputs: Any) -> Any:
        output = self.anything(**inputs)
        self.entropy = torch.distributions.Categorical(logits=output.logits.detach()).entropy().mean()
        return output


class _Penalising(_Holder):
    """Adds to the loss of the model inside, as AdaLoRA does."""

    def forward(self, **inputs: Any) -> Any:
        output = self.anything(**inputs)
        output["loss"] = (
            sum(p.square().sum() for p in self.anything.parameters()) if output.loss is None else output.loss
        )
        output.loss += 1
        return output


def _lora(**options: Any) -> Callable[[Any], nn.Module]:
    def wrap(model: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, r=4, **options)
            return get_peft_model(model, config)  # type: ignore[return-value]

    return wrap


def _prompt(model: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


class _Wrapped(CausalLM):
    def __init__(self, wrap: Callable[[Any], nn.Module], **overrides: Any) -> None:
        def sgd(params: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD([param for param in params if param.requires_grad], lr=LR)

        super().__init__(tiny_config(), pretrained=False, optimizer=sgd)
        self.wrap, self.overrides = wrap, overrides
        self.gradients: dict[str, Tensor] = {}
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.wrap(tiny_model(**self.overrides))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.gradients:
            named = self.model.named_parameters()  # type: ignore[union-attr]
            self.gradients = {name: whole(param.grad) for name, param in named if param.requires_grad}

    def on_train_batch_end(self, *_: Any) -> None:
        self.losses.append(self._train_loss.item())  # type: ignore[union-attr]


def _data(ranks: int) -> list[dict[str, Tensor]]:
    """Of uneven numbers of targets."""
    return [batch for batch in batches(STEPS * ranks + 1, 2, padded=True) if (batch["labels"] != -100).any()][
        : STEPS * ranks
    ]


def _expected(wrap: Callable[[Any], nn.Module], overrides: dict[str, Any]) -> dict[str, Any]:
    """One process: peft's own labels where it has added tokens, the wrapper's logits and a mean over all tokens."""
    module, world = wrap(tiny_model(**overrides)).train(), dist.get_world_size()
    optimizer = torch.optim.SGD([param for param in module.parameters() if param.requires_grad], lr=LR)
    expected: dict[str, Any] = {"losses": []}
    data = _data(world)
    for step in range(STEPS):
        total, count = torch.zeros(()), 0
        for batch in data[step * world : (step + 1) * world]:
            output = module(input_ids=batch["input_ids"])
            logits = output if isinstance(output, Tensor) else output.logits
            labels = F.pad(batch["labels"], (logits.shape[1] - batch["labels"].shape[1], 0), value=-100)[:, 1:]
            total = total + F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        expected["losses"].append(total.item() / count)
        if step == 0:
            expected["gradients"] = {n: grad_or_zero(p) for n, p in module.named_parameters() if p.requires_grad}
        optimizer.step()
    expected["weights"] = {name: param.detach() for name, param in module.named_parameters()}
    return expected


def _train(
    root: Path,
    wrap: Callable[[Any], nn.Module],
    fused: bool = True,
    tolerance: float = 1e-5,
    overrides: dict[str, Any] | None = None,
    flags: dict[str, Any] | None = None,
    evaluates: bool = True,
    **options: Any,
) -> _Wrapped:
    """Compares losses, gradients and weights with one process; then ``evaluates`` and predicts."""
    overrides = overrides or {}
    module, rank, world = _Wrapped(wrap, **overrides), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    strategy = ExpertParallelStrategy(ep=2, **options)
    trainer = quiet(root, strategy=strategy, max_steps=STEPS, use_distributed_sampler=False, **(flags or {}))
    loader = DataLoader(_data(world)[rank::world], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    head = adapter.recall(module.model, loss_module._Head)  # type: ignore[arg-type]
    assert head is not None
    assert head.gives_the_logits == fused
    with torch.compiler.set_stance("force_eager"):
        expected = _expected(wrap, overrides)
    assert module.losses == pytest.approx(expected["losses"], rel=tolerance)
    assert module.gradients.keys() == expected["gradients"].keys()
    for name, grad in expected["gradients"].items():
        assert relative_error(module.gradients[name], grad) < 10 * tolerance, name
    for name, param in module.model.named_parameters():  # type: ignore[union-attr]
        assert relative_error(whole(param), expected["weights"][name]) < tolerance, name
    if not evaluates:
        return module
    metrics = trainer.validate(module, loader, verbose=False)[0]
    predicted = trainer.predict(module, loader)
    sums = torch.stack([torch.stack([p["log_likelihood"].sum(), p["tokens"].sum().float()]) for p in predicted]).sum(0)
    dist.all_reduce(sums := sums.to(device()))
    assert metrics["val/loss"] == pytest.approx((-sums[0] / sums[1]).item(), rel=10 * tolerance)
    return module


@row()
def lora(root: Path) -> None:
    _train(root, _lora(target_modules=["q_proj", "v_proj"]))


@row()
def lora_in_bf16(root: Path) -> None:
    _train(root, _lora(target_modules=["q_proj"]), tolerance=3e-2, flags={"precision": "bf16-mixed"})


@row()
def lora_with_recompute_and_a_balancing_loss(root: Path) -> None:
    module = _Wrapped(_lora(target_modules=["q_proj"]), output_router_logits=True)
    strategy = ExpertParallelStrategy(ep=2, activation_checkpointing="full")
    quiet(root, strategy=strategy, max_steps=1).fit(module, DataLoader(_data(2), batch_size=None))  # type: ignore[arg-type]
    assert all(grad.isfinite().all() for grad in module.gradients.values())


@row()
def lora_on_the_head(root: Path) -> None:
    _train(root, _lora(target_modules=["q_proj", "lm_head"]), fused=False)


@row()
def a_head_saved_beside_lora(root: Path) -> None:
    _train(root, _lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), fused=False)


@row()
def a_tied_vocabulary_saved_beside_lora(root: Path) -> None:
    wrap = _lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    _train(root, wrap, fused=False, overrides={"tie_word_embeddings": True})


@row()
def virtual_tokens_before_sequences(root: Path) -> None:
    _train(root, _prompt)


@row()
def a_module(root: Path) -> None:
    _train(root, _Holder)


@row()
def modules_two_deep(root: Path) -> None:
    _train(root, lambda model: _Holder(_Holder(model)), overrides={"tie_word_embeddings": True})


@row()
def a_compiled_model(root: Path) -> None:
    _compiled(root, evaluates=False)


@row(slow=True)
def a_compiled_model_that_evaluates(root: Path) -> None:
    _compiled(root)


def _compiled(root: Path, **options: Any) -> None:
    torch.compiler.reset()
    wrap: Any = lambda model: torch.compile(model, backend="eager")  # noqa: E731
    _train(root, wrap, overrides={"num_hidden_layers": 1}, **options)


@row()
def a_forward_of_its_own(root: Path) -> None:
    _train(root, _Louder)


@row()
def other_logits(root: Path) -> None:
    _train(root, _Cooler, fused=False)


@row()
def logits_that_are_looked_at(root: Path) -> None:
    module = _train(root, _Watching, fused=False)
    assert module.model.entropy.isfinite()  # type: ignore[union-attr]


@row()
def a_loss_of_its_own(root: Path) -> None:
    with refused("_Penalising returns a loss of its own", "training_step"):
        _train(root, _Penalising)


@row()
def two_models(root: Path) -> None:
    with refused("holds 2", "anything"):
        _train(root, lambda model: _Holder(nn.ModuleList([_Holder(model), _Holder(tiny_model())])))


@pytest.mark.parametrize("name", row)
def test_trains_as_one_process_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
