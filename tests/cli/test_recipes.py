"""The recipes parse, are of the model that they name, and their scripts start what they say."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

from lightning_ep import ParallelLayout, from_config

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "recipes" / "qwen3_30b_a3b.yaml"

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
