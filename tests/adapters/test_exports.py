"""What becomes of a trained adapter: PEFT's file, vLLM's, the model with it merged in, and answers from each."""

from __future__ import annotations

import contextlib
import io
import json
import resource
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lightning_ep import CausalLM, ExpertParallelStrategy, LoRA, add_adapter, cli, from_config, from_pretrained
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.cli.saved_model import match
from lightning_ep.hub.adapter_files import check_adapters, export_adapters
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.export import check_export, export_sharded
from lightning_ep.hub.frozen_base import describe_bases, note_bases
from tests.hub_files import FAMILIES, family_model, refused_in_one_line
from tests.ranks import run_ranks
from tests.reference import adapted_by_peft, relative_error, tiny_config
from tests.talking import greedy, on_two_ranks, write_talking
from tests.tiny import Samples, quiet

pytestmark = [pytest.mark.usefixtures("on_the_tests_device"), on_two_ranks]

IDS = torch.arange(24).view(2, 12) * 5 % 128
TARGETS = {"peft": {}, "merged": {"merge": True}, "vllm": {"adapter_format": "vllm"}}


class _Batches(Samples):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value for name, value in super().__getitem__(index).items() if name != "id"}


def _train(root: Path, options: dict[str, Any], adapter: dict[str, Any], precision: str) -> None:
    formats = TARGETS if not adapter else {name: TARGETS[name] for name in ("peft", "merged")}
    callbacks = [HuggingFaceExport(str(root / name), **target) for name, target in formats.items()]
    saved = ModelCheckpoint(root, filename="saved", every_n_train_steps=2)
    strategy = ExpertParallelStrategy(**options)
    lora = LoRA(**{"r": 3, "init_lora_weights": "gaussian", **adapter})
    module = CausalLM(str(root / "hub"), adapter=lora, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2))
    trainer = quiet(root, strategy=strategy, callbacks=[*callbacks, saved], max_steps=2, precision=precision)
    trainer.fit(module, DataLoader(_Batches(16), batch_size=2))


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def _model(directory: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def _same(one: Path, other: Path) -> bool:
    first, second = _tensors(one), _tensors(other)
    same = (first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)
    return bool(first) and first.keys() == second.keys() and all(same)


def _check(root: Path, scale: float, in_vllm: bool, bf16: bool = False) -> None:
    """Files of the callback are those of the command; all say what PEFT says of the base with PEFT's file."""
    saved = str(root / "saved.ckpt")
    cli.main(["export", saved, str(root / "peft from file")])
    cli.main(["export", saved, str(root / "merged from file"), "--merge"])
    cli.main(["export", str(root / "peft"), str(root / "merged by hand"), "--merge"])
    assert _same(root / "peft", root / "peft from file")
    assert _same(root / "merged by hand", root / "merged from file")
    assert _same(root / "merged", root / "merged from file")
    adapted = peft.PeftModel.from_pretrained(_model(root / "hub"), root / "peft")
    with torch.no_grad():
        merged = adapted.merge_and_unload().state_dict()
    base, found = _model(root / "hub").state_dict(), _model(root / "merged").state_dict()
    assert base.keys() == merged.keys() == found.keys()
    moved = {name for name in base if not torch.equal(base[name], merged[name])}
    assert len(moved) == 12, "attention and experts of two layers"
    for name in base:
        expected = merged[name].to(torch.bfloat16).float() if bf16 else merged[name]
        close = {"rtol": 1e-2, "atol": 0} if bf16 else {"rtol": 1e-5, "atol": 1e-6}  # a tie may round either way
        assert (
            torch.equal(found[name], base[name])
            if name not in moved
            else torch.allclose(found[name], expected, **close)
        ), name
    if in_vllm:
        _check_vllm(root, saved, scale)


def _check_vllm(root: Path, saved: str, scale: float) -> None:
    """Every factor belongs to a matrix of the hub, and base + product is what merging makes of it."""
    cli.main(["export", saved, str(root / "vllm from file"), "--format", "vllm"])
    assert _same(root / "vllm", root / "vllm from file")
    factors, base, merged = (_tensors(root / name) for name in ("vllm", "hub", "merged"))
    names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in factors}
    of_expert = [f"mlp.experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")]
    inside = [*of_expert, *(f"self_attn.{p}_proj" for p in "qkvo")]
    assert names == {f"model.layers.{i}.{name}" for i in (0, 1) for name in inside}
    for name in names:
        a, b = (factors[f"base_model.model.{name}.lora_{which}.weight"] for which in "AB")
        assert a.shape[0] == b.shape[1] == 3
        assert relative_error(base[f"{name}.weight"] + scale * b @ a, merged[f"{name}.weight"]) < 1e-5
    config = json.loads((root / "vllm" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {name.rpartition(".")[2] for name in names}
    assert config["target_parameters"] is None
    assert (config["r"], config["lora_alpha"]) == (3, 32)


def test_adapters_come_out_for_peft_for_vllm_and_merged(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    run_ranks(2, _train, tmp_path, {"ep": 2}, {}, "32-true", init_process_group=False)
    _check(tmp_path, 32 / 3, in_vllm=True)
    for name in ("peft", "vllm", "merged"):
        assert (tmp_path / name / "tokenizer.json").exists()
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template
        assert "lightning_ep" in (tmp_path / name / "README.md").read_text()
        modes = {file.name: oct(file.stat().st_mode) for file in (tmp_path / name).iterdir() if file.is_file()}
        assert len(set(modes.values())) == 1, modes
    _answers(tmp_path)


def _answers(root: Path) -> None:
    """A prompt is continued alike from run, adapter and merged export, as plain transformers do it from the last."""
    prompt = AutoTokenizer.from_pretrained(root / "hub")("zeta eta")["input_ids"]
    expected = greedy(root / "merged", prompt, 12)
    assert expected != greedy(root / "hub", prompt, 12), "training must have changed what is said"
    text = root / "text.txt"
    text.write_text("zeta eta theta zeta theta eta eta zeta")
    perplexities = set()
    for checkpoint in ("merged", "peft", "saved.ckpt"):
        command = [str(root / checkpoint), "--max_new_tokens", "12", "--prompt", "zeta eta"]
        assert _said("generate", *command) == f"{expected}\n", checkpoint
        perplexities.add(_said("perplexity", str(root / checkpoint), str(text)).split(",")[1])
    assert len({value[:12] for value in perplexities}) == 1, perplexities
    assert perplexities != {_said("perplexity", str(root / "hub"), str(text)).split(",")[1]}


def _said(*arguments: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.main(list(arguments))
    return printed.getvalue()


def test_an_adapter_of_peft_goes_through_unchanged_and_to_vllm(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    adapted = adapted_by_peft(_model(tmp_path / "hub"), "both")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "hub")
    adapted.save_pretrained(tmp_path / "peft")
    cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "again")])
    assert _same(tmp_path / "peft", tmp_path / "again")
    cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "vllm"), "--format", "vllm"])
    assert "base_model.model.model.layers.1.mlp.experts.7.up_proj.lora_B.weight" in _tensors(tmp_path / "vllm")


def _head(directory: Path) -> Any:
    """What the hub reads of a model card."""
    return yaml.safe_load((directory / "README.md").read_text().split("---\n")[1])


def test_an_adapter_names_a_base_of_this_machine_so_that_other_directories_find_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_talking(tmp_path / "hub")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    adapted = adapted_by_peft(_model(Path("hub")), "both")
    adapted.save_pretrained("peft")
    assert json.loads(Path("peft/adapter_config.json").read_text())["base_model_name_or_path"] == "hub"
    cli.main(["export", "peft", "out"])
    ours = add_adapter(from_pretrained("hub"), LoRA(r=2))
    note_bases(ours)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert json.loads(Path("../out/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "hub"
    )
    assert [base["model"] for base in describe_bases(ours).values()] == [str(tmp_path / "hub")]  # in checkpoints
    assert _said("generate", "../out", "--prompt", "zeta eta", "--max_new_tokens", "3")
    assert "base_model" not in _head(Path("../out")), "the hub takes ids there"
    assert f"it was `{tmp_path / 'hub'}`" in Path("../out/README.md").read_text()


def _evaluated(root: Path) -> list[Any]:
    """Validation loss and log-likelihood of a run's checkpoint, of the adapter in PEFT's files, and of the base."""
    _train(root, {"ep": 2}, {"use_rslora": True}, "32-true")
    found = []
    in_run, of_peft = LoRA(r=3, use_rslora=True), LoRA(pretrained=str(root / "peft"))
    for adapter, checkpoint in ((in_run, root / "saved.ckpt"), (of_peft, None), (None, None)):
        module, loader = CausalLM(str(root / "hub"), adapter=adapter), DataLoader(_Batches(4), batch_size=2)
        trainer = quiet(root, strategy=ExpertParallelStrategy(ep=2))
        (metrics,) = trainer.validate(module, loader, ckpt_path=checkpoint, verbose=False)
        batches: Any = trainer.predict(module, loader, ckpt_path=checkpoint)
        found.append((metrics["val/loss"], sum(batch["log_likelihood"].sum().item() for batch in batches)))
    with pytest.raises(CheckpointError, match=r"with use_rslora=True \(here False\): .* another sum"):
        trainer.validate(CausalLM(str(root / "hub"), adapter=LoRA(r=3)), loader, ckpt_path=root / "saved.ckpt")
    return found


def test_a_trainer_evaluates_an_adapter_of_a_run_and_of_pefts_files_alike(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    for of_run, of_peft, of_base in run_ranks(2, _evaluated, tmp_path, init_process_group=False):
        assert of_peft == pytest.approx(of_run, rel=1e-6)
        assert of_base != pytest.approx(of_run, rel=1e-4)


def _growth(root: Path) -> tuple[int, int]:
    """Memory that merging takes beyond what an export of a tiny model has taken, and the largest parameter's."""

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    cli.main(["export", str(root / "tiny peft"), str(root / "tiny out"), "--merge"])
    before = peak()
    cli.main(["export", str(root / "peft"), str(root / "out"), "--merge"])
    largest = max(t.numel() * t.element_size() for t in from_pretrained(root / "hub").state_dict().values())
    return peak() - before, largest


@pytest.mark.slow
def test_merging_takes_the_memory_of_one_parameter(tmp_path: Path) -> None:
    for name, sizes in (
        ("tiny ", {}),
        ("", {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 6}),
    ):
        write_talking(tmp_path / f"{name}hub", **sizes)
        model = adapted_by_peft(_model(tmp_path / f"{name}hub"), "both")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / f"{name}hub")
        model.save_pretrained(tmp_path / f"{name}peft")
    ((growth, largest),) = run_ranks(1, _growth, tmp_path, init_process_group=False)
    # The parameter as it is read and as it is merged, one expert of it in fp32, the adapter, what the allocator keeps.
    assert growth < 4 * largest, f"{growth / 1e6:.0f} MB; the largest parameter is {largest / 1e6:.0f} MB"


@pytest.mark.slow
@pytest.mark.timeout(230)  # that of the ranks must come first
@pytest.mark.parametrize(
    ("world", "options", "adapter", "precision"),
    [
        (1, {"ep": 1}, {}, "32-true"),
        (4, {"ep": 2}, {}, "32-true"),  # fsdp cuts matrices and factors in different places
        (4, {"ep": 2, "tp": 2}, {"use_rslora": True}, "32-true"),
        (2, {"ep": 2}, {}, "bf16-mixed"),
        (2, {"ep": 1, "save_distributed_checkpoint": False}, {"rank_pattern": {"q_proj": 2}}, "32-true"),
    ],
)
def test_adapters_come_out_of_every_layout(
    tmp_path: Path, world: int, options: dict[str, Any], adapter: dict[str, Any], precision: str
) -> None:
    bf16 = precision != "32-true"
    write_talking(tmp_path / "hub")
    if bf16:
        model = _model(tmp_path / "hub").to(torch.bfloat16)
        for file in tmp_path.glob("hub/model*"):
            file.unlink()
        model.save_pretrained(tmp_path / "hub")
    run_ranks(world, _train, tmp_path, options, adapter, precision, init_process_group=False, timeout=200)
    _check(tmp_path, 32 / 3, in_vllm=not adapter and not bf16, bf16=bf16)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_other_families_are_merged_as_peft_merges_them(tmp_path: Path, family: str) -> None:
    model = family_model(family)
    model.save_pretrained(tmp_path / "hub")
    adapted = add_adapter(model, LoRA(r=3, init_lora_weights=False, experts="n_routed_experts" not in FAMILIES[family]))
    adapted.save_pretrained(tmp_path / "peft")
    cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "out"), "--merge", "--model", str(tmp_path / "hub")])
    expected = peft.PeftModel.from_pretrained(_model(tmp_path / "hub"), tmp_path / "peft")
    found = _model(tmp_path / "out")
    assert relative_error(_logits(found), _logits(expected)) < 1e-5
    assert relative_error(_logits(found), _logits(_model(tmp_path / "hub"))) > 1e-3


def test_modules_to_save_and_new_tokens_are_in_the_merged_model(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub", tie_word_embeddings=True)
    model = _model(tmp_path / "hub")
    model.resize_token_embeddings(280)
    adapted_by_peft(model, "both", modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "modules_to_save" in name:
                param.add_(0.1)
    export_sharded(model, tmp_path / "out", merge=True)
    found = _model(tmp_path / "out")
    assert found.get_input_embeddings().weight.shape == (280, 32)
    assert relative_error(_logits(found), _logits(model)) < 1e-5
    export_adapters(model, tmp_path / "peft")
    base = _model(tmp_path / "hub")
    base.resize_token_embeddings(280)
    assert relative_error(_logits(peft.PeftModel.from_pretrained(base, tmp_path / "peft")), _logits(model)) == 0


@pytest.mark.parametrize(
    ("lora", "target", "message"),
    [
        (LoRA(experts=False, use_dora=True), "vllm", r"use_dora\): its weight is no sum(?s:.)*vLLM reads no DoRA"),
        (LoRA(modules_to_save=["lm_head"]), "vllm", "vLLM reads no modules that are trained whole"),
        (LoRA(experts=False, use_dora=True), "merge", "variant of LoRA"),
        (LoRA(experts=False, lora_bias=True), "merge", "lora_bias"),
    ],
)
def test_what_a_format_does_not_hold_is_refused_before_training(
    tmp_path: Path, lora: LoRA, target: Any, message: str
) -> None:
    write_talking(tmp_path / "hub")
    model: Any = add_adapter(_model(tmp_path / "hub"), lora)
    check_adapters(model, tmp_path / "out")
    check = partial(check_export, merge=True) if target == "merge" else partial(check_adapters, file_format=target)
    with pytest.raises(CheckpointError, match=message):
        check(model, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_experts_that_vllm_holds_fused_and_trained_weights_of_no_adapter_are_refused(tmp_path: Path) -> None:
    fused: Any = add_adapter(family_model("gpt_oss"), LoRA(r=3))
    with pytest.raises(CheckpointError, match=r"_proj is not one matrix .* reads PEFT's own format"):
        check_adapters(fused, tmp_path / "out", file_format="vllm")
    model: Any = add_adapter(from_pretrained(write_talking(tmp_path / "hub")), LoRA(r=3))
    model.get_parameter("model.norm.weight").requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"1 trained parameters .* model.norm.weight.*modules_to_save"):
        check_adapters(model, tmp_path / "out")


def _said_on_this_rank(checkpoint: Path) -> str:
    return _said("generate", str(checkpoint), "--max_new_tokens", "12", "--prompt", "zeta eta")


@pytest.mark.slow
def test_several_ranks_answer_with_an_adapter(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    adapted = adapted_by_peft(_model(tmp_path / "hub"), "both")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "hub")
    adapted.save_pretrained(tmp_path / "peft")
    cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "out"), "--merge"])
    prompt = AutoTokenizer.from_pretrained(tmp_path / "hub")("zeta eta")["input_ids"]
    expected = greedy(tmp_path / "out", prompt, 12)
    assert expected != greedy(tmp_path / "hub", prompt, 12)
    said = run_ranks(2, _said_on_this_rank, tmp_path / "peft", init_process_group=False)
    assert said == [f"{expected}\n", ""]


def test_an_adapter_answers_over_the_revision_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "cache" / "models--owner--name"
    for revision, theta in (("main", 10000.0), ("old", 10.0)):
        rope = {"rope_type": "default", "rope_theta": theta}
        write_talking(repository / "snapshots" / revision, rope_parameters=rope)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    old = repository / "snapshots" / "old"
    adapted = adapted_by_peft(_model(old), "attention")
    config: Any = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = "owner/name", "old"
    adapted.save_pretrained(tmp_path / "peft")
    cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "merged"), "--merge"])
    prompt = AutoTokenizer.from_pretrained(old)("zeta eta")["input_ids"]
    expected = greedy(tmp_path / "merged", prompt, 12)
    cli.main(["export", str(tmp_path / "peft"), str(tmp_path / "again")])
    assert _head(tmp_path / "again")["base_model"] == "owner/name"
    over_main = peft.PeftModel.from_pretrained(_model(repository / "snapshots" / "main"), tmp_path / "peft")
    over_main.merge_and_unload().save_pretrained(tmp_path / "over main")
    AutoTokenizer.from_pretrained(old).save_pretrained(tmp_path / "over main")
    assert expected != greedy(tmp_path / "over main", prompt, 12)
    assert _said_on_this_rank(tmp_path / "peft") == f"{expected}\n"


def test_a_checkpoint_that_does_not_say_how_adapters_are_scaled_is_refused() -> None:
    shape = (torch.Size([3, 32]), torch.float32)
    tensors: Any = {"model.model.layers.0.self_attn.q_proj.lora_A.default.weight": shape}
    with pytest.raises(CheckpointError, match=r"does not say how they are scaled.*HuggingFaceExport"):
        match(tensors, from_config(tiny_config()), "model.", "it")


def test_mistakes_of_the_command_are_said_in_one_line(tmp_path: Path) -> None:
    write_talking(tmp_path / "hub")
    adapted = adapted_by_peft(_model(tmp_path / "hub"), "attention")
    adapted.save_pretrained(tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    out = str(tmp_path / "out")
    for arguments, kind, message in (
        (["--merge"], CheckpointError, "does not say which model it is an adapter of: .*--model"),
        (["--merge", "--format", "vllm"], ValueError, "--format vllm is for adapters"),
    ):
        with refused_in_one_line(kind, message):
            cli.main(["export", str(tmp_path / "peft"), out, *arguments])
    with refused_in_one_line(CheckpointError, "does not say which model"):
        cli.main(["generate", str(tmp_path / "peft"), "--prompt", "zeta"])
