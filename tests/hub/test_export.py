"""Exports: what transformers reads back is the trained model, and what is incomplete is not there."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from lightning_ep import CausalLM, ExpertParallelStrategy, cli, from_pretrained, parallelize
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.checkpoint import files
from lightning_ep.hub import writer as export_module
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.export import export_sharded
from tests.hub_files import FAMILIES, family_model, full_state, layout, refused_in_one_line, write_checkpoint
from tests.ranks import device, run_ranks
from tests.reference import VOCAB
from tests.talking import TEMPLATE, write_talking
from tests.tiny import Samples, quiet


def _read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, through the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        found = load_file(file)
        assert not tensors.keys() & found.keys()
        tensors.update(found)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["weight_map"].keys() == tensors.keys()
    return tensors


IDS = torch.arange(24).view(2, 12) * 5 % VOCAB


class _Batches(Samples):
    """Batches that `CausalLM` takes."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return {"input_ids": sample["input_ids"], "labels": sample["labels"]}


def _train(root: Path, checkpoint: str, ep: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    callbacks = [
        HuggingFaceExport(str(root / "exported")),
        ModelCheckpoint(root, filename="saved", every_n_train_steps=2),
    ]
    strategy = ExpertParallelStrategy(ep=ep, **options)
    trainer = quiet(root, strategy=strategy, callbacks=callbacks, max_steps=2)
    module = CausalLM(checkpoint, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2))
    trainer.fit(module, DataLoader(_Batches(16), batch_size=2))
    with torch.no_grad():
        logits = module.model(input_ids=IDS.to(device())).logits.cpu()
    state = full_state(module.model)
    return (state if trainer.is_global_zero else {}), logits


@pytest.mark.parametrize(
    ("world", "ep", "options", "checkpoint"),
    [
        (1, 1, {}, {}),
        (2, 2, {"save_distributed_checkpoint": False, "async_save": True}, {"sharded": False}),
        (4, 2, {"async_save": True}, {"tie_word_embeddings": True}),
        (4, 4, {"save_distributed_checkpoint": False}, {"fused": True}),
        (4, 2, {"tp": 2}, {"tie_word_embeddings": True}),
    ],
)
def test_round_trip(tmp_path: Path, world: int, ep: int, options: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    original = write_checkpoint(tmp_path / "hub", **checkpoint).state_dict()
    run = run_ranks(world, _train, tmp_path, str(tmp_path / "hub"), ep, options, init_process_group=False)
    trained, logits = run[0]
    assert not torch.equal(trained["lm_head.weight"], original["lm_head.weight"])
    saved = str(tmp_path / "saved.ckpt")
    cli.main(["export", saved, str(tmp_path / "converted")])
    cli.main(["export", saved, str(tmp_path / "with tokenizer"), "--model", str(tmp_path / "hub")])
    for directory in (tmp_path / "exported", tmp_path / "converted", tmp_path / "with tokenizer"):
        assert "model.layers.0.mlp.experts.3.gate_proj.weight" in _read(directory)
        model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not any(info.values()), info
        assert model.dtype == torch.float32
        state = model.state_dict()
        assert state.keys() == trained.keys()
        assert all(torch.equal(state[name], value) for name, value in trained.items())
        model.set_experts_implementation("eager")
        with torch.no_grad():
            tolerance = 1e-5 if device().type == "cpu" else 1e-3  # another device's sums
            torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=tolerance, atol=tolerance)
        config = json.loads((directory / "config.json").read_text())
        assert config["architectures"] == ["Qwen3MoeForCausalLM"]
        assert "lightning_ep" not in str(config)
        assert "vllm serve" in (directory / "README.md").read_text()
        assert not directory.with_name(f"{directory.name}.incomplete").exists()
    assert len(list((tmp_path / "exported").glob("*.safetensors"))) == world, "every rank writes"


def _export(paths: list[str], root: Path, ep: int, dtype: torch.dtype | None, file_bytes: int) -> None:
    export_module.MAX_FILE_BYTES = file_bytes
    for path in paths:
        model = from_pretrained(path)
        parallelize(model, layout(ep), device())
        export_sharded(model, root / Path(path).name, dtype)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_what_was_not_trained_comes_out_as_it_went_in(tmp_path: Path, world: int, ep: int) -> None:
    paths = []
    for family in FAMILIES:
        paths.append(str(tmp_path / "hub" / family))
        family_model(family).save_pretrained(paths[-1])
    paths.append(str(tmp_path / "hub" / "uneven"))
    write_checkpoint(Path(paths[-1]), hidden_size=36, moe_intermediate_size=9, vocab_size=VOCAB + 1)
    run_ranks(world, _export, paths, tmp_path / "out", ep, None, 30_000)
    for path in paths:
        original, found = _read(Path(path)), _read(tmp_path / "out" / Path(path).name)
        assert found.keys() == original.keys(), path
        assert all(torch.equal(found[key], value) for key, value in original.items()), path
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / Path(path).name)


def test_parameters_are_cast_and_buffers_are_not(tmp_path: Path) -> None:
    family_model("deepseek_v3").save_pretrained(tmp_path / "hub")
    run_ranks(2, _export, [str(tmp_path / "hub")], tmp_path / "out", 2, torch.bfloat16, 10**9)
    original, found = _read(tmp_path / "hub"), _read(tmp_path / "out" / "hub")
    for key, value in original.items():
        dtype = torch.float32 if key.endswith("e_score_correction_bias") else torch.bfloat16
        assert torch.equal(found[key], value.to(dtype)), key
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hub").dtype == torch.bfloat16


class _Tokenizer:
    def save_pretrained(self, path: Path) -> None:
        (Path(path) / "tokenizer.json").write_text("mine")


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "hub" / "tokenizer.json").write_text("of the checkpoint")
    (tmp_path / "hub" / "merges.txt").write_text("of the checkpoint")
    run_ranks(1, _export_with_tokenizers, tmp_path)
    assert (tmp_path / "copied" / "tokenizer.json").read_text() == "of the checkpoint"
    assert (tmp_path / "copied" / "merges.txt").exists()
    assert (tmp_path / "saved" / "tokenizer.json").read_text() == "mine"


def _export_with_tokenizers(root: Path) -> None:
    model = from_pretrained(root / "hub")
    parallelize(model, layout(1), device())
    export_sharded(model, root / "copied")
    export_sharded(model, root / "saved", tokenizer=_Tokenizer())


def test_what_a_chat_needs_goes_with_the_model(tmp_path: Path) -> None:
    hub = write_talking(tmp_path / "hub")
    templates = {"default": TEMPLATE, "tools": "{{ tools }}"}
    named = AutoTokenizer.from_pretrained(hub)
    named.chat_template = templates
    named.save_pretrained(hub)
    assert (hub / "additional_chat_templates" / "tools.jinja").exists()
    (hub / "added_tokens.json").write_text("{}")
    (hub / "modeling_own.py").write_text("# of the checkpoint")
    run_ranks(2, _train_talking, tmp_path, init_process_group=False)
    cli.main(["export", str(tmp_path / "saved.ckpt"), str(tmp_path / "converted"), "--model", str(hub)])
    for directory in (tmp_path / "copied", tmp_path / "converted", tmp_path / "again"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        assert tokenizer.chat_template == templates, directory
        assert tokenizer.all_special_tokens == named.all_special_tokens
        assert tokenizer("<|turn|>zeta")["input_ids"] == named("<|turn|>zeta")["input_ids"]
        assert (directory / "modeling_own.py").exists()
        found, expected = map(GenerationConfig.from_pretrained, (directory, hub))
        assert (found.eos_token_id, found.temperature, found.top_k) == (0, 0.6, 20)
        assert found.to_diff_dict() == expected.to_diff_dict()
    assert (tmp_path / "converted" / "added_tokens.json").exists()


def _train_talking(root: Path) -> None:
    trainer = quiet(root, max_steps=1, callbacks=[HuggingFaceExport(str(root / "copied"))])
    module = CausalLM(str(root / "hub"))
    trainer.fit(module, DataLoader(_Batches(4)))
    trainer.save_checkpoint(root / "saved.ckpt")
    tokenizer = AutoTokenizer.from_pretrained(root / "hub")
    for _ in range(2):  # the second time over the first
        export_sharded(module.model, root / "again", tokenizer=tokenizer, into_existing=True)


def test_a_generation_ends_where_the_tokenizer_says_if_no_config_does(tmp_path: Path) -> None:
    hub = write_talking(tmp_path / "hub", eos_token_id=None)
    (hub / "generation_config.json").unlink()
    run_ranks(1, _export_with_eos, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config.eos_token_id == 0


def _export_with_eos(root: Path) -> None:
    model = from_pretrained(root / "hub")
    parallelize(model, layout(1), device())
    assert model.generation_config.eos_token_id is None
    export_sharded(model, root / "saved", tokenizer=AutoTokenizer.from_pretrained(root / "hub"))


def test_a_checkpoint_brings_no_code_and_writes_nowhere_else(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "hub")
    for name in ("../stray.json", "modeling_own.py", "/stray.json"):
        header = {"format": 1, "configs": {"model": model.config.to_dict()}, "files": {name: b"{}"}}
        state = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        torch.save({"state_dict": state, "lightning_ep": header}, tmp_path / "run.ckpt")
        with refused_in_one_line(CheckpointError, f"holds a file '{name}', which has no place beside a model"):
            cli.main(["export", str(tmp_path / "run.ckpt"), str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_the_model_card_says_how_to_serve_try_and_upload_the_model(tmp_path: Path) -> None:
    write_talking(tmp_path / "chat")
    write_talking(tmp_path / "text", template=None)
    paths = [str(tmp_path / name) for name in ("chat", "text")]
    run_ranks(1, _export, paths, tmp_path / "out", 1, None, 10**9)
    for name, line in (("chat", "lightning-ep generate . --chat"), ("text", "lightning-ep generate . --prompt ")):
        card = (tmp_path / "out" / name / "README.md").read_text()
        _, head, body = card.split("---\n", 2)
        assert yaml.safe_load(head) == {
            "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lightning_ep"],
        }  # fmt: skip
        assert f"\nvllm serve . --served-model-name {name}\n" in body
        assert f"\nhf upload YOUR_NAME/{name} .\n" in body
        assert line in body
        assert 'Qwen3MoeForCausalLM.from_pretrained(".")' in body


# ---------------------------------------------------------------------- failures


def _disk_fills_up_on_rank_1(path: str, out: Path) -> str:
    model = from_pretrained(path)
    parallelize(model, layout(2), device())
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as info:
        export_sharded(model, out)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(info.value)


def test_a_failed_export_is_not_there_and_all_ranks_know(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub")
    messages = run_ranks(2, _disk_fills_up_on_rank_1, str(tmp_path / "hub"), tmp_path / "out")
    assert messages[0] == messages[1]
    assert "on rank 1" in messages[0]
    assert "File too large" in messages[0]
    assert not (tmp_path / "out").exists()
    run_ranks(2, _export, [str(tmp_path / "hub")], tmp_path / "again", 2, None, 10**9)  # what is left is no obstacle


def test_an_existing_directory_is_refused_before_training(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    trainer = quiet(
        tmp_path, strategy=ExpertParallelStrategy(ep=1), callbacks=[HuggingFaceExport(str(tmp_path / "out"))]
    )
    with pytest.raises(FileExistsError, match="is not replaced"):
        trainer.fit(CausalLM(str(tmp_path / "no model that could be opened")), DataLoader(_Batches(4)))
    recipe = ["--config", "sft_quickstart", "--trainer.callbacks+=lightning_ep.callbacks.HuggingFaceExport"]
    with refused_in_one_line(FileExistsError, "is not replaced"):  # one process has not started another
        cli.main(["fit", *recipe, "--trainer.callbacks.path", str(tmp_path / "out"), "--trainer.devices", "100"])
    with refused_in_one_line(FileExistsError, "is not replaced"):
        cli.main(["export", str(tmp_path), str(tmp_path / "out")])


def test_nothing_is_written_after_a_fast_dev_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "hub")
    callback = HuggingFaceExport(str(tmp_path / "out"))
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(ep=1), callbacks=[callback], fast_dev_run=True)
    trainer.fit(CausalLM(str(tmp_path / "hub")), DataLoader(_Batches(4)))
    assert not (tmp_path / "out").exists()


def _save(root: Path, checkpoint: str) -> None:
    trainer = quiet(root, max_steps=1)
    trainer.fit(CausalLM(checkpoint), DataLoader(_Batches(4)))
    trainer.save_checkpoint(root / "saved.ckpt")


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HARM"],)


def test_checkpoints_are_read_by_their_own_config_and_without_running_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = write_checkpoint(tmp_path / "hub")
    run_ranks(2, _save, tmp_path, str(tmp_path / "hub"), init_process_group=False)
    saved = tmp_path / "saved.ckpt"
    meta = torch.load(saved / "meta.pt", weights_only=True)
    assert meta["lightning_ep"].pop("configs").keys() == {"model"}
    _rewrite(saved, meta)
    with refused_in_one_line(CheckpointError, "name the model with --model"):
        cli.main(["export", str(saved), str(tmp_path / "out")])
    cli.main(["export", str(saved), str(tmp_path / "named"), "--model", str(tmp_path / "hub")])
    meta["lightning_ep"]["configs"] = {"model": expected.config.to_dict()}
    _rewrite(saved, meta)
    cli.main(["export", str(saved), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    other = expected.config.to_dict() | {"num_hidden_layers": 3, "vocab_size": VOCAB + 8}
    _rewrite(saved, {**meta, "lightning_ep": {"format": 1, "configs": {"model": other}}})
    with refused_in_one_line(CheckpointError, r"missing \(11\)") as refusal:
        cli.main(["export", str(saved), str(tmp_path / "misfit")])
    assert "    model.model.layers.2.mlp.experts.down_proj" in str(refusal[0])
    assert f"[{VOCAB}, 32], the config makes it [{VOCAB + 8}, 32]" in str(refusal[0])
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    _rewrite(saved, {**meta, "extra": _Harmful()})
    with refused_in_one_line(CheckpointError, "only among objects that may run code"):
        cli.main(["export", str(saved), str(tmp_path / "harmed")])
    cli.main(["export", str(saved), str(tmp_path / "harmless"), "--model", str(tmp_path / "hub")])
    (saved / ".metadata").write_bytes(pickle.dumps(_Harmful()))
    _rewrite(saved, meta)
    with refused_in_one_line(CheckpointError, r"names posix\.mkdir"):
        cli.main(["export", str(saved), str(tmp_path / "harmed")])
    torch.save({"state_dict": {}, "extra": _Harmful()}, tmp_path / "one.ckpt")
    with refused_in_one_line(CheckpointError, "They may run code when loaded"):
        cli.main(["export", str(tmp_path / "one.ckpt"), str(tmp_path / "harmed")])
    assert not (tmp_path / "harm").exists()
    assert not (tmp_path / "harmed").exists()


def _rewrite(checkpoint: Path, meta: dict[str, Any]) -> None:
    """Changes what is no tensor, as whoever made the checkpoint could."""
    torch.save(meta, checkpoint / "meta.pt")
    _sign(checkpoint)


def _sign(checkpoint: Path) -> None:
    files.delete(checkpoint / files.MANIFEST)
    files.write_manifest(checkpoint, {path.name: files.checksum(path) for path in checkpoint.iterdir()})


# ---------------------------------------------------------------------- memory


def _growth(path: str, root: Path) -> tuple[int, int, int]:
    model: PreTrainedModel = from_pretrained(path)
    parallelize(model, layout(2), device())
    before = _peak()
    export_sharded(model, root / "out")
    after = _peak()
    # What a LightningModule with an attribute `model` saves.
    dcp.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, checkpoint_id=root / "saved")
    if dist.get_rank() == 0:
        torch.save({"lightning_ep": {"configs": {"model": model.config.to_dict()}}}, root / "saved" / "meta.pt")
        _sign(root / "saved")
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters() if isinstance(p, DTensor))
    return after - before, largest, held


def _command_growth(root: Path) -> int:
    tiny = write_checkpoint(root / "tiny")
    state = {f"model.{key}": value for key, value in tiny.state_dict().items()}
    dcp.save({"state_dict": state}, checkpoint_id=root / "warm", no_dist=True)
    torch.save({"lightning_ep": {"configs": {"model": tiny.config.to_dict()}}}, root / "warm" / "meta.pt")
    _sign(root / "warm")
    cli.main(["export", str(root / "warm"), str(root / "warmed")])  # code that is used for the first time takes memory
    before = _peak()
    cli.main(["export", str(root / "saved"), str(root / "converted")])
    return _peak() - before


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.skipif(os.environ.get("LIGHTNING_EP_TEST_DEVICE") == "cuda", reason="shards are not in host memory")
def test_exports_take_the_memory_of_one_parameter(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 6}
    write_checkpoint(tmp_path / "hub", sharded=False, vocab_size=8192, **sizes)
    for growth, largest, held in run_ranks(2, _growth, str(tmp_path / "hub"), tmp_path):
        assert held > 4 * largest
        assert growth < 1.5 * largest, f"{growth / 1e6:.0f} MB; the largest parameter is {largest / 1e6:.0f} MB"
    growth = run_ranks(1, _command_growth, tmp_path, init_process_group=False)[0]
    # The parameter, a rank's part of it as torch reads it, and what the allocator keeps. The model is ten times this.
    assert growth < 4 * largest, f"{growth / 1e6:.0f} MB; the largest parameter is {largest / 1e6:.0f} MB"
    original, converted = _read(tmp_path / "hub"), _read(tmp_path / "converted")
    assert all(torch.equal(converted[key], value) for key, value in original.items())
