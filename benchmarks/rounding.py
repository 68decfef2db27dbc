"""Loss curves of bf16 weights that are rounded stochastically, beside fp32 masters and bf16 rounded to the nearest.

    python -m benchmarks.rounding curves --folder runs/rounding --sizes 4-layers --jobs 9
    python -m benchmarks.rounding curves --folder runs/tiny --sizes tiny --device cpu  # 10 minutes on 2 cores
    python -m benchmarks.rounding plot --folder runs/rounding --picture docs/operate/rounding.svg

A model is trained on the source code of the standard library with fp32 weights; then, from there, on the docstrings of
installed packages at a learning rate of 1e-5, for less than an epoch, in every way with every seed (the order of the
data, and the random bits). ``runs.jsonl`` in the folder gets a line per run: the training loss of each step and some
validation losses, nats per token. Runs that it holds are not repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import sysconfig
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from benchmarks.ours import quiet_trainer
from benchmarks.records import Record, append, machine, provenance, read, table
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, Schedule
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.data import TextDataModule
from lightning_ep.data.resumable_loader import ResumableLoader

FP32, STOCHASTIC, NEAREST = "fp32 masters", "bf16, stochastic", "bf16, nearest"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    FP32: ("bf16-mixed", {}),
    STOCHASTIC: ("bf16-true", {"stochastic_rounding": True}),
    NEAREST: ("bf16-true", {}),
}
LEARNING_RATE = 1e-5
VALIDATIONS = 10  # in a run, and one before it
SIZES: dict[str, dict[str, Any]] = {
    "4-layers": {
        "model": {
            "vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
            "moe_intermediate_size": 256,
        },
        "sequence": 512, "batch": 16, "base_steps": 1000, "bytes": 60_000_000, "validation_batches": 8,
    },
    "tiny": {
        "model": {
            "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
        "sequence": 64, "batch": 8, "base_steps": 600, "bytes": 2_500_000, "validation_batches": 16,
    },
}  # fmt: skip
# Whose docstrings are read, until there are enough of them.
PACKAGES = "transformers torch numpy scipy pandas matplotlib sklearn datasets networkx sympy".split()  # noqa: SIM905
_DOCSTRING = re.compile(r'"""(.{200,}?)"""', re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    """Trains the base and what is missing of the runs, and prints how far they are from one another; or draws them."""
    parser = argparse.ArgumentParser("python -m benchmarks.rounding", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=["curves", "plot"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", default="tiny", choices=sorted(SIZES))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--base-steps", type=int, help="default: the size's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on the same device")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--picture", type=Path, help="the SVG to draw")
    options = parser.parse_args(arguments)
    if options.what == "curves":
        curves(options)
    runs = read(options.folder / "runs.jsonl")
    print(summary(runs))
    if options.picture:
        draw(runs, options.picture)


def curves(options: argparse.Namespace) -> None:
    """Trains what the folder does not hold, each in a process of its own; raises the error of one that failed."""
    texts = write_docstrings(options.folder / "docstrings", SIZES[options.sizes]["bytes"])
    print(f"{texts / 1e6:.1f} MB of docstrings", flush=True)
    path = options.folder / "runs.jsonl"
    if not (options.folder / "base").is_dir():
        print(_alone(train_base, options), flush=True)
    _data(options, seed=0).prepare_data()  # once, before several runs look for it
    known = {(run["way"], run["seed"]) for run in read(path)}
    missing = [(way, seed) for seed in options.seeds for way in options.ways if (way, seed) not in known]
    with ThreadPoolExecutor(options.jobs) as threads:
        for run in as_completed([threads.submit(_alone, train_one, options, *which) for which in missing]):
            append(path, run.result())


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_docstrings(folder: Path, most: int) -> int:
    """Writes the longer docstrings of installed packages, a file for each module, up to so many bytes; returns them."""
    root, size = Path(sysconfig.get_paths()["purelib"]), 0
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.iterdir())
    folder.mkdir(parents=True)
    for number, path in enumerate(path for name in PACKAGES for path in sorted((root / name).rglob("*.py"))):
        text = "\n\n".join(_DOCSTRING.findall(path.read_text(encoding="utf-8", errors="ignore")))
        if text and size < most:
            (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
            size += len(text.encode())
    return size


class _Ordered(TextDataModule):
    """Whose seed is of the order of the training windows alone: every run is validated on the same text."""

    order = 0

    @override
    def train_dataloader(self) -> ResumableLoader:
        self.seed, split = self.order, self.seed
        try:
            return super().train_dataloader()
        finally:
            self.seed = split


def _data(options: argparse.Namespace, seed: int) -> TextDataModule:
    """The docstrings."""
    base, cache = str(options.folder / "base"), str(options.folder / "cache")
    size, texts = SIZES[options.sizes], str(options.folder / "docstrings")
    data = _Ordered(texts, size["sequence"], size["batch"], tokenizer=base, cache_dir=cache, validation_fraction=0.05)
    data.order = seed
    return data


def _trainer(
    options: argparse.Namespace, precision: str, steps: int, callback: L.Callback, **settings: Any
) -> L.Trainer:
    return quiet_trainer(
        ExpertParallelStrategy(ep=1), options.device, 1, precision=precision, max_steps=steps, callbacks=[callback],
        check_val_every_n_epoch=None, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def train_base(options: argparse.Namespace) -> str:
    """Trains on source code and exports weights and tokenizer to ``base``."""
    size, cache = SIZES[options.sizes], str(options.folder / "cache")
    config = {"model_type": "qwen3_moe", "norm_topk_prob": True, "tie_word_embeddings": True, **size["model"]}
    L.seed_everything(0)
    optimizer = partial(AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = partial(Schedule, warmup=0.05, end=0.1)
    module = CausalLM(config, pretrained=False, optimizer=optimizer, lr_scheduler=schedule)
    vocabulary = size["model"]["vocab_size"]
    data = TextDataModule("stdlib", size["sequence"], size["batch"], vocab_size=vocabulary, cache_dir=cache)
    steps = options.base_steps or size["base_steps"]
    trainer = _trainer(
        options, "bf16-mixed", steps, HuggingFaceExport(str(options.folder / "base")), limit_val_batches=0
    )
    trainer.fit(module, datamodule=data)
    return f"base: {trainer.callback_metrics['train/loss']:.3f} after {steps} steps"


class _Losses(L.Callback):
    """What is logged, without waiting for it in each step."""

    def __init__(self) -> None:
        self.train: list[Tensor] = []
        self.validation: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.train.append(trainer.callback_metrics["train/loss"].clone())

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.validation.append((trainer.global_step, round(float(trainer.callback_metrics["val/loss"]), 5)))


def train_one(options: argparse.Namespace, way: str, seed: int) -> Record:
    """Trains in one way with one seed and returns its record."""
    precision, flags = WAYS[way]
    L.seed_everything(seed)
    optimizer = partial(AdamW, lr=LEARNING_RATE, weight_decay=0.1, **flags)
    module, data, losses = CausalLM(str(options.folder / "base"), optimizer=optimizer), _data(options, seed), _Losses()
    batches, every = SIZES[options.sizes]["validation_batches"], options.steps // VALIDATIONS
    trainer = _trainer(options, precision, options.steps, losses, limit_val_batches=batches, val_check_interval=every)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    assert options.steps <= trainer.num_training_batches, "less than an epoch: no text comes twice"
    train = [round(loss, 5) for loss in torch.stack(losses.train).tolist()]
    record = {"way": way, "seed": seed, "sizes": options.sizes, "train": train, "validation": losses.validation}
    return {**record, **provenance(), "machine": machine(torch.device(options.device))}


def by_way(runs: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """The ways that there are, each with its runs in order of seeds."""
    for way in WAYS:
        if found := sorted((run for run in runs if run["way"] == way), key=lambda run: run["seed"]):
            yield way, found


def summary(runs: Sequence[Record]) -> str:
    """Last validation losses; what each way learnt of what fp32 learnt; and its distance from fp32, seed by seed."""
    ends = {way: {run["seed"]: run["validation"][-1][1] for run in found} for way, found in by_way(runs)}
    before, rows = runs[0]["validation"][0][1], []
    for way, end in ends.items():
        learnt = (before - statistics.fmean(end.values())) / (before - statistics.fmean(ends[FP32].values()))
        spread = f" (std {statistics.stdev(end.values()):.5f})" if len(end) > 1 else ""
        rows.append({
            "weights": way, "validation loss": f"{statistics.fmean(end.values()):.5f}{spread}",
            "learnt of fp32's": f"{learnt:.3f}",
            "paired difference from fp32": ", ".join(f"{end[seed] - ends[FP32][seed]:+.5f}" for seed in end),
        })  # fmt: skip
    return f"before: {before:.5f}\n{table(rows)}"


def draw(runs: Sequence[Record], path: Path) -> None:
    """Validation losses of every run; and how far those of the ways that keep up are from the mean of fp32's seeds."""
    import matplotlib.pyplot as plt

    plt.rc("svg", fonttype="none", hashsalt="benchmarks")
    fp32: defaultdict[int, list[float]] = defaultdict(list)
    for step, loss in (point for run in runs if run["way"] == FP32 for point in run["validation"]):
        fp32[step].append(loss)
    figure, (losses, apart) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for colour, width, (way, found) in zip(
        ("#bbbbbb", "#1f77b4", "#d62728"), (4, 1.2, 1.2), by_way(runs), strict=False
    ):
        for number, run in enumerate(found):
            steps, values = zip(*run["validation"], strict=True)
            losses.plot(steps, values, color=colour, linewidth=width, label=way if number == 0 else None)
            if way != NEAREST:
                differences = [value - statistics.fmean(fp32[step]) for step, value in run["validation"]]
                apart.plot(steps, differences, color=colour, linewidth=width)
    losses.set(title="validation loss, nats per token", xlabel="step")
    apart.set(title="the same, minus the mean of fp32 masters", xlabel="step")
    losses.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
