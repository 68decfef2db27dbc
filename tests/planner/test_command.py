"""``lightning-ep plan``: what it prints, how it ends, and the recipe that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lightning_ep import ParallelLayout, cli
from lightning_ep.planner import find_model
from lightning_ep.planner.families import shipped


def _plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *arguments])
    printed = capsys.readouterr()
    return ended.value.code, (printed.out + printed.err).replace("\n  ", " ")  # paragraphs are wrapped


def test_it_answers_in_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    given = ("Qwen/Qwen3-30B-A3B", "--gpus", "16", "--sequence_length", "32768", "--tokens_per_step", "1048576")
    code, shown = _plan(capsys, *given)
    assert code == 0
    assert len(shown.splitlines()) <= 25
    for said in (
        "30.53 B parameters, 3.35 B active, 48 layers",
        "16 x H100, 2 nodes, network 400 Gb/s per GPU",
        r"Memory per GPU, GiB: weights [\d.]+, gradients [\d.]+, optimizer [\d.]+, activations",
        r"A step of 1,048,576 tokens takes a GPU [\d,]+ ms: attention core \d+%",
        r"Across nodes or inside: .* ep=16 .* inside a node \(ep=\d\)",
        r"Is EP worth it: FSDP2 alone \(ep=1\) makes [\d,]+ .* EP \(ep=\d+\) [\d,]+: [\d.]+ times as many",
        "All figures are estimates.*Never measured: more than 2 GPUs, the network",
    ):
        assert re.search(said, shown), said
    rows = re.findall(r"(->|  ) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(none|selective|full)", shown)
    assert len(rows) == 10
    assert [mark for mark, *_ in rows].count("->") == 1
    for _, *sizes, _ in rows:
        ep, fsdp, replicate, tp, cp = map(int, sizes)
        ParallelLayout(16, ep, fsdp, replicate, tp, cp)


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "zai-org/GLM-4.5-Air", "Qwen/Qwen3-Next-80B-A3B-Instruct"])
def test_other_families_are_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = _plan(capsys, name, "--gpus", "32", "--gpu", "H200")
    assert code == 0
    assert name in shown
    assert "Never measured: more than 2 GPUs, the network, these widths" in shown
    assert shipped()[name].get("note", "") in shown


def test_faster_networks_and_larger_memories_are_seen(capsys: pytest.CaptureFixture[str]) -> None:
    def rate(*options: str) -> float:
        _, shown = _plan(capsys, "Qwen/Qwen3-30B-A3B", "--gpus", "16", "--tokens_per_step", "262144", *options)
        found = re.search(r"ep=16 across nodes makes ([\d,]+)", shown)
        assert found, shown
        return float(found[1].replace(",", ""))

    plain = rate()
    assert rate("--network_gbps", "100") < plain < rate("--memory_gib", "141")
    assert rate("--skew", "2") < plain


def test_gpus_have_the_names_that_people_and_drivers_give_them(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("h100", "NVIDIA H100 80GB HBM3"):
        assert "8 x H100, 1 node" in _plan(capsys, "qwen3-30b-a3b", "--gpus", "8", "--gpu", name)[1]


def test_what_does_not_fit_ends_with_1_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = _plan(capsys, "Qwen/Qwen3-235B-A22B", "--gpus", "8")
    assert code == 1
    advice = re.search(r"nothing fits: .* What would fit: --gpus (\d+), or --lora_rank 16\.", shown)
    assert advice, shown
    assert _plan(capsys, "Qwen/Qwen3-235B-A22B", "--gpus", advice[1])[0] == 0
    assert _plan(capsys, "Qwen/Qwen3-235B-A22B", "--gpus", str(int(advice[1]) // 2))[0] == 1
    assert _plan(capsys, "Qwen/Qwen3-235B-A22B", "--gpus", "8", "--lora_rank", "16")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Qwen/Qwen3-30B", "--gpus", "8"], "there is no model 'Qwen/Qwen3-30B'.*Did you mean Qwen/Qwen3-30B-A3B?"),
        (["Qwen/Qwen3-30B-A3B"], "--gpus"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "0"], "0: must be a positive integer"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--gpu", "V100"], "--gpu V100 is not known; choose one of A100, H100"),
        (["quickstart", "--gpus", "8"], "quickstart is a recipe; plan takes a model"),
        (["mine.yaml", "--gpus", "8"], "mine.yaml is a recipe"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--network_gbps", "-1"], "--network_gbps -1: must be positive"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--lora_rank", "-1"], "--lora_rank -1: must be positive"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--skew", "0.5"], "--skew 0.5: the busiest rank"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--skew", "nan"], "--skew nan: the busiest rank"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--memory_gib", "nan"], "--memory_gib nan: must be positive"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "8", "--tokens", "inf"], "--tokens: inf: must be a positive integer"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "nan"], "--gpus: nan: must be a positive integer"),
        (["Qwen/Qwen3-30B-A3B", "--gpus", "16", "--tokens_per_step", "12288"], "no layout of 16 GPUs .*65,536 tokens"),
    ],
)
def test_wrong_questions_end_with_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown = _plan(capsys, *arguments)
    assert code == 2
    assert re.search(message, shown), shown


def test_its_recipe_is_one_that_fit_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    given = ("Qwen/Qwen3-30B-A3B", "--gpus", "16", "--tokens_per_step", "1048576", "--yaml", str(file))
    code, shown = _plan(capsys, *given, "--tokens", "1e9")
    assert code == 0
    assert f"-m lightning_ep fit --config {file}" in shown.splitlines()[-1]
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config", str(file), "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    strategy, trainer, data = config["trainer"]["strategy"]["init_args"], config["trainer"], config["data"]["init_args"]
    layout = ParallelLayout(16, *(strategy[name] for name in ("ep", "fsdp", "replicate", "tp", "cp")))
    assert trainer["num_nodes"] * int(trainer["devices"]) == 16
    step = data["sequence_length"] * data["batch_size"] * layout.data_world_size * trainer["accumulate_grad_batches"]
    assert step == 1_048_576
    assert trainer["max_steps"] == round(1e9 / step)
    assert config["model"]["init_args"]["model"] == "Qwen/Qwen3-30B-A3B"
    assert re.search(rf"-> +{layout.ep} +{layout.fsdp} +1 +{layout.tp} +{layout.cp} +", shown, re.MULTILINE)
    assert strategy["activation_checkpointing"] in ("none", "selective", "full")
    again, why = _plan(capsys, *given)
    assert again == 2
    assert f"{file} exists already" in why
    adapted = tmp_path / "lora.yaml"
    assert _plan(capsys, *given[:3], "--lora_rank", "8", "--yaml", str(adapted))[0] == 0
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config", str(adapted), "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    shipped = yaml.safe_load(Path("recipes/qwen3_30b_a3b_lora.yaml").read_text())
    model, like = config["model"]["init_args"], shipped["model"]["init_args"]
    assert {name: model["adapter"][name] for name in like["adapter"]} == like["adapter"]
    for name in ("optimizer", "lr_scheduler"):
        given = model[name]["init_args"]
        assert {key: given[key] for key in like[name]["init_args"]} == like[name]["init_args"]
    assert config["data"]["class_path"] == shipped["data"]["class_path"]


def test_a_model_of_a_file_is_in_its_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, file = tmp_path / "config.json", tmp_path / "mine.yaml"
    source.write_text(json.dumps({**find_model("Qwen/Qwen3-30B-A3B").config, "num_hidden_layers": 6}))
    assert _plan(capsys, str(source), "--gpus", "2", "--yaml", str(file))[0] == 0
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config", str(file), "--print_config"])
    assert ended.value.code == 0
    model = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert model["pretrained"] is False
    assert model["model"]["num_hidden_layers"] == 6
