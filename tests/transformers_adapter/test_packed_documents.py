"""Documents packed into a row are separate documents, whatever way the batch reaches the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DynamicCache

from lightning_ep import ExpertParallelStrategy
from lightning_ep import transformers_adapter as adapter
from lightning_ep.context_parallel import find_documents
from lightning_ep.transformers_adapter import Packing, packing
from tests.hub.every_family import auto_class_of, tiny_config_of
from tests.multimodal import give_small_ids
from tests.ranks import device, run_ranks
from tests.reference import VOCAB, family_model, relative_error, tiny_model
from tests.tiny import TinyModule, quiet

ROWS = [[5, 4, 3], [7, 5]]  # lengths of the documents of each row
LENGTH = 12
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    "window": {"sliding_window": 3, "use_sliding_window": True},
    "told bounds": {},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 3},  # makes its masks without the positions
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def _model(family: str) -> Any:
    if family == "gpt_oss":
        return family_model(family, {**SIZES, **FAMILIES[family]}, std=0.3)
    model = tiny_model(**FAMILIES[family])
    if family == "told bounds":
        adapter.use_bounds_of_documents(model)
        assert adapter.attention_implementation(model) == "packed_sdpa"
    return model


def _batch() -> dict[str, Tensor]:
    """Two rows of documents, none of which predicts the next one."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ROWS])
    return {"input_ids": ids, "labels": ids.where(positions > 0, -100), "position_ids": positions}


def _bounds() -> dict[str, Any]:
    """What transformers' collator for FlashAttention adds, which the others do not read."""
    bounds = F.pad(torch.tensor(ROWS[0] + ROWS[1]).cumsum(0), (1, 0)).int()
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}


def _apart(model: Any) -> Tensor:
    """The mean loss of the documents, each run by itself by plain transformers."""
    batch = _batch()
    losses = []
    for ids, lengths in zip(batch["input_ids"], ROWS, strict=True):
        for document in ids.split(lengths):
            logits = model(input_ids=document[None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, document[1:], reduction="none"))
    return torch.cat(losses).mean()


class _Holder(nn.Module):
    """A module of the user's around the model, with a forward of its own."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.inner(tokens, position_ids=positions).logits


class _Module(TinyModule):
    """Calls the model in every way that a user may, and keeps the losses."""

    def __init__(self, family: str) -> None:
        super().__init__(lr=0.0)
        self.family, self.found = family, {}

    def configure_model(self) -> None:
        if self.model is None:
            self.model = _model(self.family)
            self.holder = _Holder(self.model)

    def ways(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        model, strategy, ones = self.model, self.trainer.strategy, torch.ones_like(batch["input_ids"])
        ids, positions, labels = batch["input_ids"], batch["position_ids"], batch["labels"]

        def loss(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        whole = {
            "shard_sequence": lambda: model(**strategy.shard_sequence(batch)).loss,
            "masked shard_sequence": lambda: model(**strategy.shard_sequence({**batch, "attention_mask": ones})).loss,
        }
        if strategy.layout.cp > 1:
            return whole
        return whole | {
            "keywords": lambda: model(**batch).loss,
            "position": lambda: loss(model(ids, None, positions).logits),
            "a cache": lambda: model(**batch, use_cache=True).loss,
            "bounds": lambda: model(**batch, **_bounds()).loss,
            "masked bounds": lambda: model(**batch, **_bounds(), attention_mask=ones).loss,
            "no cache": lambda: model(**batch, use_cache=False).loss,
            "a mask": lambda: model(**batch, attention_mask=ones.bool()).loss,
            "embeddings": lambda: (
                model(inputs_embeds=model.get_input_embeddings()(ids), position_ids=positions + 0, labels=labels).loss
            ),
            "a wrapper": lambda: loss(self.holder(ids, positions)),
        }

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = {name: way() for name, way in self.ways(batch).items()}
        self.found |= {f"training, {name}": loss.item() for name, loss in losses.items()}
        return sum(losses.values()) / len(losses)  # type: ignore[return-value]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.gradients = {name: param.grad.full_tensor().cpu() for name, param in self.model.named_parameters()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.found |= {f"evaluation, {name}": way().item() for name, way in self.ways(batch).items()}

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.found |= {f"prediction, {name}": way().item() for name, way in self.ways(batch).items()}


def _losses(root: Path, family: str, cp: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    data = DataLoader([_batch()], batch_size=None)  # type: ignore[arg-type]
    module = _Module(family)
    strategy = ExpertParallelStrategy(ep=2, cp=cp)
    trainer = quiet(root, strategy=strategy, max_steps=1, num_sanity_val_steps=1, use_distributed_sampler=False)
    trainer.fit(module, data, data)
    trainer.predict(module, data)
    means = torch.tensor(list(module.found.values()), device=device())
    dist.all_reduce(means)  # ranks of cp hold pieces; otherwise all ranks have the same batch
    return dict(zip(module.found, (means / dist.get_world_size()).tolist(), strict=True)), module.gradients


@pytest.mark.parametrize(
    ("family", "cp"), [("qwen3_moe", 1), ("window", 1), ("told bounds", 1), ("gpt_oss", 1), ("qwen3_moe", 2)]
)
def test_every_way_into_a_model_gives_the_loss_of_separate_documents(family: str, cp: int, tmp_path: Path) -> None:
    model = _model(family)
    expected = _apart(model)
    expected.backward()
    for found, gradients in run_ranks(2, _losses, tmp_path, family, cp, init_process_group=False):
        assert len(found) == (6 if cp > 1 else 33)
        assert found == {name: pytest.approx(expected.item(), rel=1e-6) for name in found}
        for name, param in model.named_parameters():
            assert param.grad is None or relative_error(gradients[name], param.grad) < 1e-5, name


def _watched(family: str = "qwen3_moe") -> Any:
    model = _model(family)
    adapter.keep_documents_apart(model)
    return model


def test_calls_that_go_on_from_a_cache_still_have_one() -> None:
    plain, watched = _model("qwen3_moe"), _watched()
    ids = _batch()["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert watched.generate(ids, **arguments).equal(plain.generate(ids, **arguments))
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        first = watched(ids[:, :8], position_ids=positions[:, :8])
        again = watched(ids[:, 8:], position_ids=positions[:, 8:], past_key_values=first.past_key_values)
        torch.testing.assert_close(again.logits, plain(ids, use_cache=False).logits[:, 8:])


def test_documents_that_cannot_be_kept_apart_are_refused() -> None:
    batch = _batch()
    with pytest.raises(ValueError, match="past_key_values is a cache to fill"):
        _watched()(**batch, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match=r"cu_seq_lens_q alone .* Add position_ids that restart"):
        _watched()(batch["input_ids"], **_bounds())
    left = (torch.arange(LENGTH) > 1).expand(2, -1)
    with pytest.raises(ValueError, match="attention_mask with padding before or between"):
        _watched()(**batch, attention_mask=left)
    with pytest.raises(ValueError, match="Pad on the right"):
        find_documents(batch["position_ids"], left)
    linear = family_model("qwen3_next", {**SIZES, "moe_intermediate_size": 8, "num_experts": 4, "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8})  # fmt: skip
    adapter.keep_documents_apart(linear)
    with pytest.raises(ValueError, match=r"has layers of the types .*linear_attention.* a row of its own"):
        linear(**batch)
    with pytest.raises(ValueError, match=r"has layers of the types .*linear_attention.* a row of its own"):
        linear(**batch, **_bounds())  # its states would be apart by them, and its convolutions not
    lightning = family_model(
        "minimax", {**SIZES, "num_local_experts": 4}
    )  # does not read the bounds, as the other does
    adapter.keep_documents_apart(lightning)
    with pytest.raises(ValueError, match="linear_attention"):
        lightning(**batch, **_bounds())
    assert linear(input_ids=batch["input_ids"], labels=batch["labels"]).loss.isfinite()


@pytest.mark.parametrize(
    ("family", "kind"), [("deepseek_v4", "compressed_sparse_attention"), ("minimax_m3_vl_text", "minimax_m3_sparse")]
)
def test_documents_are_refused_where_attention_goes_by_places_in_the_row(family: str, kind: str) -> None:
    """DeepSeek-V4 makes one key of a window, MiniMax-M3 chooses blocks of keys, and both count from the row's start."""
    config: Any = tiny_config_of(family)
    if family == "minimax_m3_vl_text":
        config.layer_types, config.index_block_size, config.index_topk_blocks = [kind] * len(config.layer_types), 2, 2
    model = AutoModelForCausalLM.from_config(config)
    adapter.keep_documents_apart(model)
    batch = {key: value % 100 for key, value in _batch().items()}
    with pytest.raises(ValueError, match=f"has layers of the types .*{kind}.* a row of its own"):
        model(**batch)
    assert model(input_ids=batch["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["mistral_large4", "muse_spark"])
def test_documents_are_apart_in_text_beside_towers(family: str) -> None:
    """Mistral-Large-4 puts numbers of its dtype into the mask that it is given; Muse Spark's sound has convolutions."""
    config: Any = tiny_config_of(family)
    give_small_ids(config)
    if family == "mistral_large4":
        config.text_config.index_topk = LENGTH  # near-ties of an indexer would choose other tokens
    torch.manual_seed(0)
    model = auto_class_of(config).from_config(config, attn_implementation="eager")
    adapter.keep_documents_apart(model)
    batch = {key: value % 100 for key, value in _batch().items()}
    found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    for row, lengths in enumerate(ROWS):
        expected = [model(input_ids=ids[None]).logits[0] for ids in batch["input_ids"][row].split(lengths)]
        assert relative_error(found[row].detach(), torch.cat(expected).detach()) < 1e-5


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_a_batch_without_tokens_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"without tokens .*label is -100"):
        _watched()(torch.zeros(shape, dtype=torch.long))


def test_positions_say_what_padding_does_not() -> None:
    ones = torch.ones(1, 6)
    assert Packing.of(torch.tensor([[0, 1, 2, 0, 1, 2]]), ones) == Packing(packed=True)
    assert Packing.of(torch.tensor([[0, 1, 2, 0, 1, 1]]), torch.tensor([[1, 1, 1, 1, 1, 0]])) == Packing(packed=True)
    assert Packing.of(torch.tensor([[0, 1, 2, 3, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0, 0]])) == Packing()
    assert Packing.of(torch.tensor([[1, 1, 0, 1, 2, 3]]), torch.tensor([[0, 0, 1, 1, 1, 1]])) == Packing(gaps=True)
    assert Packing.of(torch.tensor([[0, 1, 2, 7, 8, 9]]), ones) == Packing(), "skips are no beginnings"


def test_what_the_host_has_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {**_batch(), "attention_mask": torch.ones(2, LENGTH)}
    moved = {key: value.clone() for key, value in batch.items()}
    found = adapter.packing_of(batch)
    assert found is not None
    adapter.note_packing(moved, found)
    model = _watched()
    loss = model(**moved).loss
    monkeypatch.setattr(packing.Packing, "of", lambda *_: pytest.fail("was read again"))
    assert model(**moved).loss == loss
    moved["attention_mask"][0, 7:] = 0
    with pytest.raises(pytest.fail.Exception, match="read again"):
        model(**moved)


def test_flash_attention_is_told_the_documents_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _watched()
    monkeypatch.setattr(packing, "is_flash_attention", lambda name: True)
    told: dict[str, Any] = {}
    model.model.layers[0].register_forward_pre_hook(lambda layer, args, kwargs: told.update(kwargs), with_kwargs=True)
    model(**_batch(), attention_mask=torch.ones(2, LENGTH))
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 5, 9, 12, 19, 24]
    assert told["max_length_q"] == told["max_length_k"] == 7
