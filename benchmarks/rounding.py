"""Loss curves of bf16 weights and moments rounded stochastically, beside fp32 ones and bf16 rounded to the nearest.

    python -m benchmarks.rounding --sizes small
    python -m benchmarks.rounding --sizes tiny --layers 2 --device cpu  # minutes

A model is trained on the source code of the standard library with fp32 weights; then, from there, on that of
transformers at a learning rate of 1e-5, for less than an epoch, in every way with every seed (the order of the data,
and the random bits). Each run adds a record with its validation losses. Runs that the file holds are not repeated.
`docs/_ext/curves.py` draws the second table of a record that is published.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sysconfig
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.cells import SIZES, model_config
from benchmarks.ours import quiet_trainer
from benchmarks.records import Record, append, machine, parser, provenance, read, table, write
from lightning_ep import AdamW, CausalLM, ExpertParallelStrategy, Schedule
from lightning_ep.callbacks import HuggingFaceExport
from lightning_ep.data import TextDataModule

FP32 = "fp32 masters"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    FP32: ("bf16-mixed", {}),
    "fp32, moments in bf16": ("bf16-mixed", {"stochastic_rounding": True}),
    "bf16, stochastic": ("bf16-true", {"stochastic_rounding": True}),
    "bf16, nearest": ("bf16-true", {}),
}
VALIDATIONS, VALIDATION_BATCHES = 10, 8  # in a run, and one before it; of each
_STDLIB, _PACKAGES = (sysconfig.get_paths()[kind] for kind in ("stdlib", "purelib"))
TEXTS = {  # what is learnt before, and then; tokens per window, and windows per batch
    "small": ("stdlib", f"{_PACKAGES}/transformers/**/*.py", 512, 16),
    "tiny": (f"{_STDLIB}/[a-d]*.py", f"{_PACKAGES}/transformers/models/b*/*.py", 64, 8),
}


def main(arguments: list[str] | None = None) -> None:
    """Trains the base and what is missing of the runs, and writes the tables."""
    made = parser("rounding", __doc__, layers=4, sizes=sorted(TEXTS))
    made.add_argument("--steps", type=int, default=500, help="of each run, and of the base")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = made.parse_args(arguments)
    done = {(run["way"], run["seed"]) for run in _known(options)}
    for way, seed in itertools.product(WAYS, options.seeds):
        if (way, seed) not in done:
            if not _base(options).is_dir():
                train_base(options)
            append(options.json, train_one(options, way, seed))
    runs = _known(options)
    print(write(options.json, [summary(runs), by_step(runs)], runs))


def _known(options: argparse.Namespace) -> list[Record]:
    runs = [run for run in read(options.json) if run["sizes"] == options.sizes]
    return sorted(runs, key=lambda run: (list(WAYS).index(run["way"]), run["seed"]))


# ---------------------------------------------------------------------- the runs


def _base(options: argparse.Namespace) -> Path:
    return options.json.with_suffix("") / options.sizes / "base"


def _texts(options: argparse.Namespace) -> tuple[TextDataModule, TextDataModule]:
    """What the base learns, and then the runs, in its tokens; raises ValueError if a run would see some text twice."""
    before, then, sequence, batch = TEXTS[options.sizes]
    cache, vocabulary = str(_base(options).parent / "cache"), SIZES[options.sizes]["vocab_size"]
    base = TextDataModule(before, sequence, batch, vocab_size=vocabulary, cache_dir=cache)
    base.prepare_data()
    runs = TextDataModule(then, sequence, batch, tokenizer=str(base.directory / "tokenizer"), cache_dir=cache)
    runs.prepare_data()
    for data in (base, runs):
        data.setup()
        batches = data.batches_per_epoch(1) or 0
        if options.steps > batches:
            raise ValueError(
                f"--steps {options.steps} is more than an epoch: {data.source} has {batches} batches of text, none of "
                f"which may come twice. Take --steps {batches} or fewer."
            )
    return base, runs


def _trainer(options: argparse.Namespace, precision: str, callback: L.Callback, **settings: Any) -> L.Trainer:
    return quiet_trainer(
        ExpertParallelStrategy(ep=1), options.device, 1, precision=precision, max_steps=options.steps,
        callbacks=[callback], check_val_every_n_epoch=None, num_sanity_val_steps=0, **settings,
    )  # fmt: skip


def train_base(options: argparse.Namespace) -> None:
    """Trains with fp32 weights and exports these and the tokenizer."""
    text, _ = _texts(options)
    config = model_config(options.sizes, options.layers)
    config.tie_word_embeddings = True
    L.seed_everything(0)
    optimizer = partial(AdamW, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = partial(Schedule, warmup=0.05, end=0.1)
    module = CausalLM(config, pretrained=False, optimizer=optimizer, lr_scheduler=schedule)
    trainer = _trainer(options, "bf16-mixed", HuggingFaceExport(str(_base(options))), limit_val_batches=0)
    trainer.fit(module, datamodule=text)
    print(f"base: {trainer.callback_metrics['train/loss']:.3f} after {options.steps} steps", flush=True)


class _Run(L.Callback):
    """Gives the training text a seed's order, and keeps validation losses."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self.losses: list[tuple[int, float]] = []

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.datamodule.seed = self._seed  # type: ignore[attr-defined]  # what is held out is drawn already

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.losses.append((trainer.global_step, round(float(trainer.callback_metrics["val/loss"]), 5)))


def train_one(options: argparse.Namespace, way: str, seed: int) -> Record:
    """Trains in one way with one seed and returns its record."""
    precision, flags = WAYS[way]
    L.seed_everything(seed)
    optimizer = partial(AdamW, lr=1e-5, weight_decay=0.1, **flags)
    module, data, run = CausalLM(str(_base(options)), optimizer=optimizer), _texts(options)[1], _Run(seed)
    every = {"val_check_interval": options.steps // VALIDATIONS, "limit_val_batches": VALIDATION_BATCHES}
    trainer = _trainer(options, precision, run, **every)
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    print(f"{way}, seed {seed}: {run.losses[0][1]} to {run.losses[-1][1]}", flush=True)
    record = {"way": way, "seed": seed, "sizes": options.sizes, "validation": run.losses}
    return {**record, **provenance(), "machine": machine(torch.device(options.device))}


# ---------------------------------------------------------------------- tables


def summary(runs: list[Record]) -> str:
    """Last validation losses; what each way learnt of what fp32 learnt; and its distance from fp32, seed by seed."""
    ends: dict[str, dict[int, float]] = defaultdict(dict)
    for run in runs:
        ends[run["way"]][run["seed"]] = run["validation"][-1][1]
    before, rows = runs[0]["validation"][0][1], []
    for way, end in ends.items():
        learnt = (before - statistics.fmean(end.values())) / (before - statistics.fmean(ends[FP32].values()))
        spread = f" (std {statistics.stdev(end.values()):.5f})" if len(end) > 1 else ""
        rows.append({
            "weights": way, "validation loss": f"{statistics.fmean(end.values()):.5f}{spread}",
            "learnt of fp32's": f"{learnt:.3f}",
            "paired difference from fp32": ", ".join(f"{end[seed] - ends[FP32][seed]:+.5f}" for seed in end),
        })  # fmt: skip
    return f"before: {before:.5f}\n\n{table(rows)}"


def by_step(runs: list[Record]) -> str:
    """Validation losses of every run, nats per token."""
    keys = [{"weights": run["way"], "seed": str(run["seed"])} for run in runs]
    losses = [{str(step): f"{loss:.5f}" for step, loss in run["validation"]} for run in runs]
    return table([key | found for key, found in zip(keys, losses, strict=True)])


if __name__ == "__main__":
    main()
