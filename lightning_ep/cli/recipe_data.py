"""The commands ``lightning-ep prepare`` and ``lightning-ep preview``: a recipe's data, without Trainer or GPU."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from typing_extensions import override

from lightning_ep.cli import training
from lightning_ep.cli.mistakes import refusal
from lightning_ep.data import PackedDataModule
from lightning_ep.data.preview import preview
from lightning_ep.layout import ParallelLayout
from lightning_ep.strategy import ExpertParallelStrategy
from lightning_ep_start import fail

_SIZES = ("ep", "fsdp", "replicate", "tp", "cp")


def run(args: list[str]) -> None:
    """Runs one of the commands.

    Args:
        args: The command and options of ``fit``.
    """
    # Nothing finds a GPU, a module of the user's that asks for one neither: others may be using it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    name, *options = args
    objects = training.run(["fit", *options], "lightning-ep", _WithoutTrainer)
    try:
        if objects.datamodule is None:
            raise ValueError(f"there is no data module in this recipe, whose data {name} would look at: add `data`.")
        {"prepare": _prepare, "preview": _preview}[name](objects.model, objects.datamodule, objects.config.fit.trainer)
    except (ValueError, RuntimeError, OSError) as error:
        if (cause := refusal(error)) is None:
            raise
        fail(str(cause))


class _WithoutTrainer(training.CLI):
    """The module and the data module of a ``fit`` that does not begin."""

    @override
    def instantiate_classes(self) -> None:
        # They may need what is only where the run will be.
        self.config.fit.trainer.logger = self.config.fit.trainer.callbacks = None
        super().instantiate_classes()

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return self  # type: ignore[return-value]  # its `fit` is called

    def fit(self, **_: Any) -> None:
        """Nothing."""


def _prepare(module: LightningModule, data: LightningDataModule, trainer: Namespace) -> None:
    """Prepares what the Trainer would, and says what is in it."""
    ranks = data_ranks(trainer)  # first: a layout that is impossible is said before
    module.prepare_data()
    if not isinstance(data, PackedDataModule):
        data.prepare_data()
        print(f"{type(data).__name__} has prepared its data.")
        return
    data.trains = module
    data.prepare_data()
    data.setup("fit")  # which says what there is
    print(f"prepared in {data.directory}")
    batches, accumulated = data.batches_per_epoch(ranks or 1), trainer.get("accumulate_grad_batches") or 1
    if batches is None:
        print("What is trained on is read as a stream: max_steps says how many steps there are.")
        return
    if ranks is None:
        print("The number of steps is known with the number of devices, which this recipe leaves to the machine.")
        return
    print(
        f"{-(-batches // accumulated):,} steps an epoch, each of {ranks} data ranks x {data.batch_size} windows"
        + (f" x {accumulated} batches" if accumulated > 1 else "")
    )


def _preview(module: LightningModule, data: LightningDataModule, trainer: Namespace) -> None:
    if not isinstance(data, PackedDataModule):
        raise ValueError(
            f"{type(data).__name__} does not say how rows become documents, as data modules of lightning_ep.data and "
            "subclasses of PackedDataModule do: there is nothing to preview."
        )
    data.trains = module
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # of characters that a terminal lacks
    for line in preview(data, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")):
        print(line)


def data_ranks(trainer: Namespace) -> int | None:
    """Number of ranks that would see different batches, from a Trainer's arguments; None if the machine decides it.

    Raises:
        ValueError: If the sizes of ExpertParallelStrategy do not fit the number of devices.
    """
    devices, strategy = _devices(trainer.devices, trainer.accelerator), trainer.strategy
    if devices is None:
        return None
    world = devices * trainer.num_nodes
    if isinstance(strategy, Namespace):
        module, _, name = strategy.class_path.rpartition(".")
        if issubclass(getattr(importlib.import_module(module), name), ExpertParallelStrategy):
            sizes = {size: strategy.init_args[size] for size in _SIZES if size in strategy.init_args}
            sizes = {"ep": "auto", "fsdp": "auto", **sizes}
            return ParallelLayout.resolve(world_size=world, processes_per_node=devices, **sizes).data_world_size
    return world


def _devices(devices: int | str | list[int], accelerator: Any) -> int | None:
    """Processes of a node."""
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str) and "," in devices:
        devices = [int(device) for device in devices.split(",") if device]
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, int):
        return devices if devices > 0 else None
    return 1 if accelerator == "cpu" else None
