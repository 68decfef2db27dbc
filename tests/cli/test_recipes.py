"""The recipes are found by name, are of the model that they name, and their scripts start what they say."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from lightning_ep import ParallelLayout, Schedule, __version__, cli, from_config
from lightning_ep.checkpoint.saved_weights import SavedWeights
from lightning_ep.data import corpus
from lightning_ep.data.examples import docstrings
from lightning_ep.data.standard_library import standard_library
from lightning_ep.transformers_adapter import load_processor
from lightning_ep_start import recipes
from tests.hub_files import write_checkpoint
from tests.talking import write_talking
from tests.vision import asked, picture, plain_inputs, summed_plain_loss, write_rows, write_vision_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "recipes" / "qwen3_30b_a3b.yaml"
RECIPES = {path.stem: path for path in (REPOSITORY / "recipes").glob("*.yaml")}
SCRIPTS = {path.name: path for path in (REPOSITORY / "recipes").glob("*.sh")}

TINY = """
trainer:
  accelerator: cpu
  precision: 32-true
  strategy: {class_path: lightning_ep.ExpertParallelStrategy, init_args: {compile: false}}
  max_steps: 2
  accumulate_grad_batches: 2
  val_check_interval: 2
  limit_val_batches: 1
  log_every_n_steps: 1
model:
  class_path: lightning_ep.CausalLM
  init_args:
    model:
      model_type: qwen3_moe
      vocab_size: 300
      hidden_size: 32
      num_hidden_layers: 1
      num_attention_heads: 4
      num_key_value_heads: 2
      head_dim: 8
      num_experts: 8
      num_experts_per_tok: 4
      moe_intermediate_size: 16
      output_router_logits: true
data:
  class_path: lightning_ep.data.TextDataModule
  init_args: {source: texts, sequence_length: 16, vocab_size: 260, validation_fraction: 0.3}
"""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with nothing in it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def _ends(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as info:
        cli.main(list(arguments))
    return info.value.code


def _listed(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_they_are_listed_with_a_line_each(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _ends("recipes") == 0
    shown = capsys.readouterr().out
    listed = _listed(shown)
    assert list(listed) == [*sorted(RECIPES), *sorted(SCRIPTS)]
    assert max(map(len, shown.splitlines())) <= 140
    for name, path in (RECIPES | SCRIPTS).items():
        assert f"# {listed[name]}\n" in path.read_text()
        assert listed[name].endswith("."), "the line is a whole sentence"


def test_a_name_runs_the_recipe(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["fit", "--config", "quickstart", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["lightning-ep", *arguments])  # as in the process of a user
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    by_name = capsys.readouterr()
    assert _ends("fit", "--config", str(RECIPES["quickstart"]), "--print_config") == 0
    assert by_name.out == capsys.readouterr().out
    assert yaml.safe_load(by_name.out)["trainer"]["logger"]["init_args"]["name"] == "quickstart"
    assert not by_name.err, "neither Lightning nor a file of that name is spoken of"


@pytest.mark.parametrize("option", [["--config", "quickstart"], ["--config=quickstart"], ["-c", "quickstart"]])
def test_names_are_replaced_where_a_config_is_given(option: list[str], empty: Path) -> None:
    given = ["fit", *option, "--data.source", "quickstart", "--config", "s3://bucket/quickstart.yaml"]
    found = recipes.with_files(given)
    expected = str(RECIPES["quickstart"])
    assert [word.removeprefix("--config=") for word in found[len(option) : 1 + len(option)]] == [expected]
    assert found[1 + len(option) :] == given[1 + len(option) :]
    assert len(found) == len(given)


@pytest.mark.parametrize("file", ["quickstart", "quickstart.yaml"])
def test_a_file_of_that_name_wins_and_that_is_said_once_and_on_one_rank(
    file: str, empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty / file).write_text("mine")
    given = ["fit", "--config", "quickstart"]
    found = recipes.with_files(given)
    assert Path(found[2]).read_text() == "mine"
    assert recipes.with_files(found) == found
    line = f"lightning-ep: --config quickstart is the file ./{file} here, not the recipe of that name.\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert recipes.with_files(given) == found
    assert not capsys.readouterr().err


def test_a_file_of_the_users_needs_no_suffix_and_no_remark(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (empty / "mine.yaml").touch()
    (empty / "quickstart").mkdir()
    found = recipes.with_files(["fit", "--config", "quickstart", "--config", "mine"])
    assert found[2] == str(RECIPES["quickstart"])
    assert Path(found[4]).resolve() == empty / "mine.yaml"
    assert not capsys.readouterr().err


def test_a_file_is_shown_and_copied_as_it_is_and_replaces_nothing(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, path in (RECIPES | SCRIPTS).items():
        assert _ends("recipes", "show", name) == 0
        assert capsys.readouterr().out == path.read_text()
        assert _ends("recipes", "copy", name, "my/own") == 0
        copied = empty / "my" / "own" / path.name
        assert copied.read_text() == path.read_text()
        assert os.access(copied, os.X_OK) == (name in SCRIPTS)
        told = capsys.readouterr().out.split()
        assert told[-1] == f"my/own/{path.name}"
    copied.write_text("mine\n")
    assert _ends("recipes", "copy", name, "my/own") == 2
    assert "exists already" in capsys.readouterr().err
    assert copied.read_text() == "mine\n"


def _python(*arguments: str, path: Path = REPOSITORY, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, "PYTHONPATH": str(path)}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=100, **options,
    )  # fmt: skip


def _logged_by(recipe: str, *options: str, folder: Path) -> str:
    """Trains by a recipe, in a process and folder of its own, and returns the metrics that it has written there."""
    done = _python("-m", "lightning_ep", "fit", "--config", recipe, *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "runs" / recipe / "version_0" / "metrics.csv").read_text()


@pytest.mark.parametrize("start", [["-m", "lightning_ep"], ["-c", "import lightning_ep_start as s; s.main()"]])
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "usage: lightning-ep"),
        (["--version"], f"lightning-ep {__version__}"),
        (["recipes"], "quickstart "),
        (["plan", "Qwen/Qwen3-30B-A3B", "--gpus", "8"], "Is EP worth it"),
        (["plan", "Qwen/Qwen3-30B-A3B", "--gpus", "9"], "9 GPUs are no whole nodes"),
        (["fit"], "needs --config"),
        (["fit", "--config", "qickstart"], "did you mean quickstart?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_needs_no_torch_does_not_import_it(
    start: list[str], arguments: list[str], shown: str, empty: Path
) -> None:
    done = _python("-X", "importtime", *start, *arguments, cwd=empty)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "lightning_ep_start" in imported
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & imported
    assert shown in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["plan", "Qwen/Qwen3-30B-A3B", "--gpus", "8"]])
def test_a_reader_that_leaves_gets_no_traceback(arguments: list[str], empty: Path) -> None:
    read, write = os.pipe()
    os.close(read)  # as `| head` does when it has its lines
    with os.fdopen(write, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "lightning_ep", *arguments], env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            cwd=empty, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=100,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize(
    ("name", "warm_up", "peak", "last"),
    [
        ("qwen3_30b_a3b", 500, 3e-4, 0.0),
        ("continued_pretraining", 1000, 1e-5, 1e-6),
        ("qwen3_30b_a3b_sft", 1000, 1e-5, 1e-6),
        ("qwen3_30b_a3b_sft_2gpu", 1000, 1e-5, 1e-6),
        ("qwen3_vl_30b_a3b_sft", 1000, 1e-5, 1e-6),
        ("qwen3_30b_a3b_lora", 600, 1e-4, 1e-5),  # ten times the rate of continued_pretraining
        ("qwen3_30b_a3b_dpo", 2000, 1e-5, 0.0),  # ten times trl's default for full fine-tuning
    ],
)
def test_the_learning_rate_is_what_its_source_says(name: str, warm_up: int, peak: float, last: float) -> None:
    init = yaml.safe_load(RECIPES[name].read_text())["model"]["init_args"]
    assert init["lr_scheduler"]["class_path"] == "lightning_ep.Schedule"
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=init["optimizer"]["init_args"]["lr"])
    schedule = Schedule(optimizer, total_steps=20_000, **init["lr_scheduler"]["init_args"])
    rates = []
    for _ in range(20_000):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(peak)
    assert rates.index(max(rates)) == warm_up - 1
    assert rates[-1] == pytest.approx(last, rel=1e-2, abs=1e-9)


@pytest.mark.parametrize("name", ["continued_pretraining", "qwen3_30b_a3b_sft", "qwen3_vl_30b_a3b_sft"])
def test_published_weights_go_on_with_as_many_tokens_per_step_as_its_source(name: str) -> None:
    recipe = yaml.safe_load(RECIPES[name].read_text())
    trainer, data = recipe["trainer"], recipe["data"]["init_args"]
    assert trainer["devices"] * data["batch_size"] == 16
    assert data["sequence_length"] == 8192
    assert f"of 8 GPUs x {data['batch_size']} windows x 8,192 tokens" in RECIPES[name].read_text()
    architecture = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["model"]
    layout = ParallelLayout.resolve(trainer["strategy"]["init_args"]["ep"], "auto", 8, 8)
    layout.check_num_experts(architecture["num_experts"], "the recipe")
    assert data["sequence_length"] <= architecture["max_position_embeddings"]


@pytest.mark.slow
def test_published_weights_are_trained_further_and_exported(empty: Path) -> None:
    (empty / "texts").mkdir()
    for index in range(4):
        (empty / "texts" / f"{index}.txt").write_text(f"the quick brown fox {index} jumps over lazy dogs\n" * 20)
    tokenizer = corpus.train_tokenizer(iter(["zeta eta theta " * 50]), 262)
    write_checkpoint(empty / "published", vocab_size=300)
    tokenizer.save_pretrained(empty / "published")
    (empty / "small.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  devices: 2\n  precision: 32-true\n  max_steps: 2\n  val_check_interval: 2\n"
        "  log_every_n_steps: 1\n"
        "  strategy: {class_path: lightning_ep.ExpertParallelStrategy, init_args: {ep: 2, compile: false}}\n"
        "data:\n  class_path: lightning_ep.data.TextDataModule\n"
        "  init_args: {sequence_length: 16, validation_fraction: 0.3}\n"
    )
    options = ["--model.init_args.model", "published", "--trainer.callbacks.init_args.dtype", "float32"]
    metrics = _logged_by("continued_pretraining", "--config", "small", *options, "--ckpt_path", "last", folder=empty)
    assert "train/loss" in metrics
    assert "val/loss" in metrics
    exported = AutoModelForCausalLM.from_pretrained(empty / "exports" / "continued_pretraining")
    before = AutoModelForCausalLM.from_pretrained(empty / "published")
    moved = [not torch.equal(a, b) for a, b in zip(exported.parameters(), before.parameters(), strict=True)]
    assert all(moved)
    differences = [(a - b).abs().max() for a, b in zip(exported.parameters(), before.parameters(), strict=True)]
    assert max(differences) < 1e-4, "they are the published weights, two small steps later"
    assert AutoTokenizer.from_pretrained(empty / "exports/continued_pretraining").get_vocab() == tokenizer.get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_published_weights_are_fine_tuned_on_chats_and_exported(nodes: int, empty: Path) -> None:
    """On one node as the recipe says, and as on two: EP inside of a node, and every expert sharded over both."""
    answer = {"role": "assistant", "content": "theta zeta"}
    row = {"messages": [{"role": "user", "content": "zeta eta"}, answer]}
    (empty / "my_chats.jsonl").write_text(f"{json.dumps(row)}\n" * 40)
    write_talking(empty / "published", vocab_size=300)
    (empty / "small.yaml").write_text(
        f"trainer:\n  accelerator: cpu\n  devices: {2 * nodes}\n  precision: 32-true\n  max_steps: 2\n"
        "  val_check_interval: 2\n  log_every_n_steps: 1\n"
        "  strategy: {class_path: lightning_ep.ExpertParallelStrategy, init_args: {ep: 2, compile: false}}\n"
        "data:\n  class_path: lightning_ep.data.ChatDataModule\n"
        f"  init_args: {{sequence_length: 32, batch_size: {2 // nodes}, validation_fraction: 0.2}}\n"
    )
    options = ["--model.init_args.model", "published", "--trainer.callbacks.init_args.dtype", "float32"]
    metrics = _logged_by("qwen3_30b_a3b_sft", "--config", "small", *options, "--ckpt_path", "last", folder=empty)
    assert "train/loss" in metrics
    assert "val/loss" in metrics
    exported = AutoModelForCausalLM.from_pretrained(empty / "exports" / "qwen3_30b_a3b_sft")
    before = AutoModelForCausalLM.from_pretrained(empty / "published")
    assert not exported.config.output_router_logits, "balancing is off"
    assert any(not torch.equal(a, b) for a, b in zip(exported.parameters(), before.parameters(), strict=True))
    template = AutoTokenizer.from_pretrained(empty / "exports/qwen3_30b_a3b_sft").chat_template
    assert template == AutoTokenizer.from_pretrained(empty / "published").chat_template


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_published_weights_are_fine_tuned_on_images_and_exported(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run says of the validation data at its end, transformers says of them with what came out."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as `preview` and `prepare` set it
    published = write_vision_checkpoint(empty / "published")
    pictures = [picture(empty / f"{number}.png", (24 + 8 * number, 40), number) for number in range(3)]
    rows = [asked("What? ", pictures[number % 3], answer=f"Number {number}.") for number in range(8)]
    rows += [asked(f"How much is {number}?", answer="Much.") for number in range(8)]
    write_rows(empty / "my_chats.jsonl", rows)
    held_out = [asked(pictures[0], pictures[2], " And these?", answer="Other numbers."), asked("Hello?", answer="Hi.")]
    write_rows(empty / "held_out.jsonl", held_out)
    (empty / "small.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  devices: 2\n  precision: 32-true\n  max_steps: 2\n  val_check_interval: 2\n"
        "  log_every_n_steps: 1\n"
        "  strategy: {class_path: lightning_ep.ExpertParallelStrategy, init_args: {ep: 2, compile: false}}\n"
        "data:\n  class_path: lightning_ep.data.VisionChatDataModule\n  init_args:\n"
        "    {sequence_length: 96, batch_size: 1, num_workers: 1, validation_source: held_out.jsonl, min_pixels: 64,"
        " max_pixels: 1024}\n"
    )
    for command, said in (("preview", "<|vision_start|><|image_pad|> x "), ("prepare", "prepared in runs")):
        cli.main([command, "qwen3_vl_30b_a3b_sft", "--config", "small", "--model.init_args.model", "published"])
        assert said in capsys.readouterr().out
    options = ["--model.init_args.model", "published", "--trainer.callbacks.init_args.dtype", "float32"]
    metrics = _logged_by("qwen3_vl_30b_a3b_sft", "--config", "small", *options, "--ckpt_path", "last", folder=empty)
    values = [row["val/loss"] for row in csv.DictReader(metrics.splitlines()) if row.get("val/loss")]
    export = empty / "exports" / "qwen3_vl_30b_a3b_sft"
    model = AutoModelForImageTextToText.from_pretrained(export)
    inputs = [plain_inputs(row, load_processor(export, AutoTokenizer.from_pretrained(export))) for row in held_out]
    tokens = sum(int((one["labels"] != -100).sum()) for one in inputs)
    expected = sum(float(summed_plain_loss(model, one).detach()) for one in inputs) / tokens
    assert float(values[-1]) == pytest.approx(expected, rel=1e-4)
    before = dict(AutoModelForImageTextToText.from_pretrained(published).named_parameters())
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved == {name for name in before if not name.startswith("model.visual.")}
    assert json.loads((export / "preprocessor_config.json").read_text())["size"]["longest_edge"] == 1024


@pytest.mark.slow
def test_adapters_are_trained_on_a_model_of_the_quick_start_and_on_published_weights(empty: Path) -> None:
    turns = ({"role": "user", "content": f"{i}?"} for i in range(40))
    chats = [{"messages": [turn, {"role": "assistant", "content": f"It is {turn['content']}"}]} for turn in turns]
    (empty / "my_chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    text = RECIPES["lora_quickstart"].read_text()
    first = text.partition("lightning-ep fit --config quickstart ")[2].partition("\n#   lightning-ep")[0]
    export = first.replace("\\\n#", " ").split()
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    tiny = ["--trainer.accelerator", "cpu", "--trainer.strategy.compile", "false", "--data.sequence_length", "64"]
    few += ["--trainer.log_every_n_steps", "1"]
    tiny += ["--trainer.accumulate_grad_batches", "1", "--data.batch_size", "1", "--data.validation_fraction", "0.2"]
    chat = ["--data.source", "my_chats.jsonl", "--data.chat_template", "plain"]
    _logged_by("quickstart", *few, *export, folder=empty)
    assert "train/loss" in _logged_by("lora_quickstart", *few, *chat, folder=empty)
    own = ["--model.model", "runs/quickstart/model"]
    assert "train/loss" in _logged_by("qwen3_30b_a3b_lora", *few, *tiny, *chat, *own, folder=empty)
    saved = SavedWeights(empty / "runs/lora_quickstart/checkpoints/last.ckpt")
    assert saved.tensors
    assert all(".lora_" in key for key in saved.tensors), "the model that lies beneath is not in it"


@pytest.mark.slow
def test_preferences_are_trained_on_published_weights(empty: Path) -> None:
    write_talking(empty / "published")
    pairs = [{"prompt": f"eta {i}", "chosen": "zeta", "rejected": "theta"} for i in range(40)]
    (empty / "my_pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"]
    tiny = ["--trainer.accelerator", "cpu", "--trainer.strategy.compile", "false", "--data.sequence_length", "64"]
    few += ["--trainer.accumulate_grad_batches", "1", "--model.model", "published"]
    metrics = _logged_by("qwen3_30b_a3b_dpo", *few, *tiny, folder=empty)
    assert "train/reward_margin" in metrics
    assert "val/reward_accuracy" in metrics
    adapter = empty / "exports" / "qwen3_30b_a3b_dpo"
    assert all(".lora_" in key for key in load_file(adapter / "adapter_model.safetensors"))


def test_the_model_is_the_one_it_is_named_after() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    model = from_config(AutoConfig.for_model(**recipe["model"]["init_args"]["model"]))
    assert sum(param.numel() for param in model.parameters()) == 30_532_122_624  # as published
    nodes, per_node = recipe["trainer"]["num_nodes"], recipe["trainer"]["devices"]
    layout = ParallelLayout.resolve(
        recipe["trainer"]["strategy"]["init_args"]["ep"], "auto", nodes * per_node, per_node
    )
    layout.check_num_experts(model.config.num_experts, "the recipe")
    assert layout.ep == per_node


def _run(folder: Path, script: str, *arguments: str, **environment: str) -> str:
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [f"recipes/{script}", *arguments], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=100,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _stub(folder: Path, name: str) -> None:
    """A launcher that notes its own options and runs the command once."""
    stub = folder / name
    stub.write_text('#!/bin/sh\nwhile case "$1" in -*) ;; *) false ;; esac; do echo "$1" >> options; shift; done\n'
                    'exec "$@"\n')  # fmt: skip
    stub.chmod(stub.stat().st_mode | stat.S_IEXEC)


def _resumes(config: dict[str, Any]) -> bool:
    """Whether another start finds what this one saves, also one that SLURM requeued."""
    keep = config["trainer"]["callbacks"][0]["init_args"]
    fixed = keep["dirpath"] is not None and config["trainer"]["default_root_dir"] is not None
    return config["ckpt_path"] == "last" and keep["save_last"] == "link" and fixed


@pytest.mark.slow
def test_the_slurm_script_starts_what_it_asks_slurm_for(tmp_path: Path) -> None:
    _stub(tmp_path, "srun")
    printed = _run(
        tmp_path, "slurm.sh", "--trainer.max_steps", "7", "--print_config",
        SLURM_NNODES="4", SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="3",
    )  # fmt: skip
    config = yaml.safe_load(printed)
    trainer = config["trainer"]
    assert (trainer["num_nodes"], int(trainer["devices"]), trainer["max_steps"]) == (4, 2, 7)
    assert _resumes(config)
    assert (tmp_path / "options").read_text().split() == ["--kill-on-bad-exit=1", "--distribution=block"]
    asked = [
        line.split()[1] for line in (REPOSITORY / "recipes/slurm.sh").read_text().splitlines() if "#SBATCH" in line
    ]
    recipe = yaml.safe_load(RECIPE.read_text())["trainer"]
    expected = {f"--nodes={recipe['num_nodes']}", f"--ntasks-per-node={recipe['devices']}", "--signal=SIGUSR1@300"}
    assert expected <= set(asked)


@pytest.mark.slow
def test_the_torchrun_script_trains_on_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for index in range(4):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"the quick brown fox {index} jumps over lazy dogs\n" * 20)
    (tmp_path / "tiny.yaml").write_text(TINY)
    _run(tmp_path, "torchrun.sh", "localhost", "--config", "tiny.yaml", NODES="1", GPUS="2")
    metrics = (tmp_path / "runs/qwen3_30b_a3b/version_0/metrics.csv").read_text()
    assert "train/loss" in metrics
    assert "val/loss" in metrics
    assert len(metrics.splitlines()) >= 3
    config = yaml.safe_load((tmp_path / "runs/qwen3_30b_a3b/version_0/config.yaml").read_text())
    assert (config["trainer"]["num_nodes"], int(config["trainer"]["devices"])) == (1, 2)
    assert _resumes(config)


def test_the_page_on_chats_says_what_the_commands_and_callbacks_take(
    empty: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (REPOSITORY / "docs" / "start" / "chats.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.S)
    (yaml_block,) = [block for kind, block in blocks if kind == "yaml" and block.startswith("trainer:")]
    (empty / "callbacks.yaml").write_text(yaml_block)
    commands = "".join(block for kind, block in blocks if kind == "bash").replace("\\\n", " ").splitlines()
    lines = [command.partition("#")[0].split() for command in commands]
    fits = [words[1:] for words in lines if words[:2] == ["lightning-ep", "fit"] and "--data.source" in words]
    assert len(fits) == 2
    for words in fits:
        assert _ends(*words, "--config", "callbacks.yaml", "--print_config") == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["data"]["init_args"]["source"] == "my_chats.jsonl"
        generates, grades = config["trainer"]["callbacks"]
        assert generates["init_args"]["chat"] is True
        assert grades["init_args"]["samples"] == 128
    metric = re.search(r"`metric: (\{.*?\})`", page)
    assert metric is not None
    (empty / "metric.yaml").write_text(f"trainer: {{callbacks: [{{class_path: lightning_ep.callbacks.GradeAnswers, "
                                       f"init_args: {{metric: {metric[1]}}}}}]}}\n")  # fmt: skip
    assert _ends(*fits[0], "--config", "metric.yaml", "--print_config") == 0
    assert "torchmetrics.text.CharErrorRate" in capsys.readouterr().out


def test_the_chat_quick_start_can_be_looked_at_before(
    empty: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_EP_CACHE", str(empty / "cache"))
    few = sorted(standard_library())[:40]  # of 700, for the time that they take
    monkeypatch.setattr(docstrings, "standard_library", lambda: few)
    cli.main(["preview", "sft_quickstart"])
    shown = capsys.readouterr().out
    assert "What does the" in shown
    assert "In short: " in shown
