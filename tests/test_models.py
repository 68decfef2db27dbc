"""Models at ep=2: every way of building one, what they compute in, generation, and models that do not fit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from lightning_ep import CausalLM, ExpertParallelStrategy, from_config
from lightning_ep.callbacks import GenerateSamples
from lightning_ep.trainer import cost_warnings as advice
from tests.reference import VOCAB, relative_error, tiny_config, tiny_model
from tests.rows import RowFailures, Rows, agreed, fit, refused, whole
from tests.tiny import SMALL, Samples, TinyModule, loader, mean_loss, quiet

row = Rows()


class Built(TinyModule):
    """Builds its model with a function of the test's, in `configure_model` or in `__init__`."""

    def __init__(self, build: Callable[[], Any], in_init: bool = False) -> None:
        super().__init__()
        self.build = build
        if in_init:
            self.model = build()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.build()


def _validation_loss(root: Path, module: L.LightningModule, name: str = "val_loss") -> float:
    return quiet(root).validate(module, loader(4), verbose=False)[0][name]


# -------------------------------------------------------------------------------- where they come from


def _saved(root: Path) -> str:
    """A directory with pretrained weights."""
    _validation_loss(root, TinyModule())  # starts the process group
    if dist.get_rank() == 0:
        tiny_model(seed=7, **SMALL).save_pretrained(root / "pretrained")
    dist.barrier()
    return str(root / "pretrained")


@row()
def pretrained_by_plain_transformers(root: Path) -> None:
    path = _saved(root)
    expected = mean_loss(tiny_model(seed=7, **SMALL), 4)
    for in_init in (False, True):
        module = Built(lambda: AutoModelForCausalLM.from_pretrained(path), in_init)
        assert _validation_loss(root, module) == pytest.approx(expected, rel=1e-5)
        fit(root, module)


@row()
def pretrained_causal_lm(root: Path) -> None:
    module = CausalLM(_saved(root), optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    expected = mean_loss(tiny_model(seed=7, **SMALL), 4)
    assert _validation_loss(root, module, "val/loss") == pytest.approx(expected, rel=1e-5)
    trainer = quiet(root, max_steps=1)
    trainer.fit(module, loader(4))
    assert module.model.training, "as transformers loads it, dropout would stay off"
    assert trainer.validate(module, loader(4), verbose=False)[0]["val/loss"] < expected


@row()
def random_weights_on_the_meta_device(root: Path) -> None:
    def own_block() -> Any:
        with torch.device("meta"):
            return Qwen3MoeForCausalLM(tiny_config(**SMALL))

    losses = []
    for build in (own_block, lambda: from_config(tiny_config(**SMALL))):
        for in_init in (False, True):
            module = Built(build, in_init)
            losses.append(_validation_loss(root, module))
            assert not any(param.is_meta for param in module.parameters())
            fit(root, module)
    assert len(set(losses)) == 1, losses
    assert agreed(losses)


@row()
def a_large_model_in_memory_gets_a_warning(root: Path) -> None:
    limit, advice._LARGE_MODEL_BYTES = advice._LARGE_MODEL_BYTES, 1000
    try:
        for module, expected in ((TinyModule(), 1), (Built(lambda: from_config(tiny_config(**SMALL))), 0)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _validation_loss(root, module)
            found = [str(w.message) for w in caught if "built in memory" in str(w.message)]
            assert len(found) == (expected if dist.get_rank() == 0 else 0), found
            assert all("each of 2 ranks" in text and "from_config" in text for text in found)
    finally:
        advice._LARGE_MODEL_BYTES = limit


# -------------------------------------------------------------------------------- models that do not fit


@row()
def experts_that_ep_does_not_divide(root: Path) -> None:
    module = Built(lambda: tiny_model(num_hidden_layers=2, mlp_only_layers=[0], num_experts=3, num_experts_per_tok=2))
    with refused("ep=2 does not divide the 3 experts of model.model.layers.1", "use ep=1, fsdp=2"):
        fit(root, module)
    assert not any(isinstance(param, DTensor) for param in module.parameters()), "something was sharded"


@row()
def a_dense_model(root: Path) -> None:
    sizes = {name: getattr(tiny_config(), name) for name in ("hidden_size", "intermediate_size", "head_dim")}
    config = Qwen3Config(vocab_size=VOCAB, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, **sizes)
    module = Built(lambda: Qwen3ForCausalLM(config))
    with refused("Qwen3ForCausalLM .*no experts", "FSDPStrategy"):
        fit(root, module)
    assert not any(isinstance(param, DTensor) for param in module.parameters()), "something was sharded"


# -------------------------------------------------------------------------------- what they compute in


class _Dtypes(TinyModule):
    """Notes what its parameters, hidden states and gradients are in."""

    def __init__(self) -> None:
        super().__init__()
        self.computed: set[torch.dtype] = set()
        self.gradients: set[torch.dtype] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        layer, note = self.model.model.layers[0], self.computed.add
        hooks = [
            layer.mlp.register_forward_pre_hook(lambda _, args: note(args[0].dtype)),
            layer.register_forward_hook(lambda *args: note(args[-1].dtype)),
            layer.self_attn.register_forward_pre_hook(lambda module, _: note(module.q_proj.weight.dtype)),
            layer.mlp.experts.register_forward_hook(lambda *args: note(args[-1].dtype)),
        ]
        loss = super().training_step(batch, batch_idx)
        for hook in hooks:
            hook.remove()
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients |= {param.grad.dtype for param in self.parameters()}


@row()
def dtypes_of_every_precision(root: Path) -> None:
    f32, bf16 = torch.float32, torch.bfloat16
    inverse_frequencies = tiny_model(**SMALL).model.rotary_emb.inv_freq
    for precision, stored, computed in (("32-true", f32, f32), ("bf16-mixed", f32, bf16), ("bf16-true", bf16, bf16)):
        _, module = fit(root, _Dtypes(), precision=precision)
        assert module.computed == {computed}, f"{precision} computes in {module.computed}"
        assert module.gradients == {param.dtype for param in module.parameters()} == {stored}, precision
        assert torch.equal(module.model.model.rotary_emb.inv_freq.cpu(), inverse_frequencies), precision


class _Reductions(TorchDispatchMode):
    """Counts reduce-scatters."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "reduce_scatter" in func.name()
        return func(*args, **(kwargs or {}))


@row()
def gradients_are_reduced_once_per_window(root: Path) -> None:
    def reductions(ep: int, accumulate: int) -> int:
        with _Reductions() as reductions:
            fit(root, strategy=ExpertParallelStrategy(ep=ep), accumulate_grad_batches=accumulate)
        return reductions.count

    assert reductions(2, accumulate=1) == reductions(2, accumulate=3) > 0
    # Experts that FSDP shards (here those of one layer) reduce in every backward: two more in each of two windows.
    assert reductions(1, accumulate=3) == reductions(1, accumulate=1) + 2 * 2


def _shared_experts() -> Any:
    """A model whose layers compute, and save tensors, after their experts."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes))


class _Checkpointed(Built):
    """Puts checkpoints of its own around its layers once the strategy has them."""

    def __init__(self, build: Callable[[], Any], reentrant: bool | None) -> None:
        super().__init__(build, in_init=True)
        self.reentrant = reentrant

    def on_train_start(self) -> None:
        if self.reentrant is not None:
            for layer in self.model.model.layers:
                layer.forward = partial(self.checkpointed, layer.forward)

    def checkpointed(self, forward: Callable[..., Any], hidden: Tensor, **kwargs: Any) -> Tensor:
        kwargs["past_key_values"] = None
        return checkpoint(partial(forward, **kwargs), hidden, use_reentrant=self.reentrant)


@row()
def checkpoints_that_the_strategy_knows_nothing_of(root: Path) -> None:
    def run(
        build: Callable[[], Any], ep: int, reentrant: bool | None, early_stop: bool = True
    ) -> tuple[dict[str, Tensor], bool]:
        module = _Checkpointed(build, reentrant)
        with warnings.catch_warnings(record=True) as caught, set_checkpoint_early_stop(early_stop):
            warnings.simplefilter("always")
            trainer = quiet(root, strategy=ExpertParallelStrategy(ep=ep), max_steps=3, use_distributed_sampler=False)
            trainer.fit(module, loader())
        assert all(isinstance(param, DTensor) for param in module.parameters()), "left gathered"
        warned = any("activation_checkpointing='full'" in str(w.message) for w in caught)
        return {name: whole(param) for name, param in module.named_parameters()}, warned

    for build, replaying in ((lambda: tiny_model(**SMALL), [True]), (_shared_experts, [False, True])):
        for ep in (1, 2):
            expected, warned = run(build, ep, None)
            assert not warned
            for reentrant, early_stop in ((False, True), (True, True), (False, False)):
                found, warned = run(build, ep, reentrant, early_stop)
                assert warned is ((reentrant in replaying or not early_stop) and dist.get_rank() == 0)
                for name, value in expected.items():
                    assert relative_error(found[name], value) < 1e-6, f"{name}: ep={ep}, reentrant={reentrant}"


# -------------------------------------------------------------------------------- batches


@row()
def ranks_that_share_batches_and_are_given_different_ones_are_told(root: Path) -> None:
    def train(data: Any) -> None:
        strategy = ExpertParallelStrategy(ep=2, tp=2)
        trainer = quiet(root, strategy=strategy, max_steps=2, use_distributed_sampler=False)
        trainer.fit(TinyModule(), DataLoader(data, batch_size=None))

    with pytest.raises(
        ValueError, match=r"ranks 0 to 1 share one batch .*: batch\['id'\], batch\['input_ids'\], batch"
    ):
        train(_samples(first=int(os.environ["RANK"])))
    train(_samples(first=0))


def _samples(first: int) -> list[dict[str, Tensor]]:
    return [{key: value[None] for key, value in sample.items()} for sample in Samples(2, first)]


@row()
def ids_that_the_model_does_not_have_are_refused_with_their_place(root: Path) -> None:
    for wrong in (VOCAB, -1):
        ids = torch.zeros(2, 8, dtype=torch.long)
        ids[1, 3] = wrong
        data = DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
        with pytest.raises(
            ValueError, match=rf"hold {wrong} \(at \[1, 3\]\), and the model has ids from 0 to {VOCAB - 1}"
        ):
            quiet(root, max_steps=1, use_distributed_sampler=False).fit(
                CausalLM(tiny_config(**SMALL), pretrained=False), data
            )


# -------------------------------------------------------------------------------- generation


@row()
def generate_where_ranks_stop_at_different_lengths(root: Path) -> None:
    class Generating(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            prompt, length = batch["input_ids"][:1], 2 if self.global_rank == 0 else 7
            found = self.model.generate(input_ids=prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)
            expected = tiny_model(**SMALL).generate(
                input_ids=prompt, max_new_tokens=length, do_sample=False, pad_token_id=0
            )
            assert torch.equal(found, expected)
            generated.append(found.shape[1])

    generated: list[int] = []
    module = Generating()
    quiet(root).validate(module, loader(8), verbose=False)
    assert generated == [8 + (2 if dist.get_rank() == 0 else 7)] * 2


@row()
def samples_where_ranks_stop_at_different_lengths(root: Path) -> None:
    printed: list[str] = []

    class Kept(GenerateSamples):
        def _generate(self, *args: Any) -> list[str]:
            printed.extend(texts := super()._generate(*args))
            return texts

    length = 9 if quiet(root).global_rank else 3
    samples = Kept(["w1 w2 w3", "w4"], every_n_validations=2, max_new_tokens=length, tokenizer=_words())
    trainer = quiet(root, max_epochs=4, limit_train_batches=1, callbacks=[samples])
    trainer.fit(TinyModule(), loader(), loader(4))
    assert trainer.global_step == 4
    assert len(printed) == 2 * 2, printed
    assert printed[0].startswith("w1 w2 w3 w")
    assert printed[1].startswith("w4 w")
    assert {len(text.split()) for text in printed[::2]} == {3 + length}


def _words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({f"w{i}": i for i in range(VOCAB - 1)} | {"<pad>": VOCAB - 1}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


@pytest.mark.parametrize("name", row)
def test_works_or_is_refused(name: str, row_failures: RowFailures) -> None:
    row_failures.check(name)
