"""Reading a checkpoint in two steps: what it says, before the model is built, and its tensors, once that is sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_ep.checkpoint import files, optimizers, single_file
from lightning_ep.checkpoint.loader_position import PlainLoaders
from lightning_ep.checkpoint.metadata import HEADER, RANKS, check_header, deserialize, entry_of, place_ranks
from lightning_ep.checkpoint.optimizers import clean, listed
from lightning_ep.checkpoint.tensor_files import SafeReader, Saved, read_shards
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.distributed.shards import local_tensor
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.frozen_base import base_names, check_bases
from lightning_ep.hub.initialize import assign
from lightning_ep.layout import ParallelLayout

T = TypeVar("T")


class Resume:
    """One checkpoint that is being loaded. Every rank must make the same calls.

    Attributes:
        metadata: What Lightning restores by itself: loops, callbacks, schedulers, hyperparameters.
        random: Random state of this rank, if the checkpoint was saved on this layout.
        loaders: Where the training's plain loaders go on.

    Args:
        path: The checkpoint; rank 0's counts.
        ranks: The ranks.
        weights_only: Lightning's argument; None means True.

    Raises:
        CheckpointError: On every rank, if there is none or any file of it is damaged.
    """

    def __init__(self, path: Path, ranks: Ranks, weights_only: bool | None) -> None:
        self._ranks = ranks
        self.path = Path(ranks.on_first("loading", lambda: str(files.find(path))))
        self.is_directory = self.path.is_dir()
        self.random: dict[str, Any] | None = None
        self.loaders = PlainLoaders()
        if self.is_directory:
            self._verify()
            self._reader = SafeReader(self.path)
            name = self.path / files.META
        else:
            ranks.on_first("loading", lambda: single_file.check_file(self.path))
            name = self.path

        def read() -> dict[str, Any]:
            return deserialize(name, weights_only, mmap=not self.is_directory)

        self.metadata = self._alone(read)
        self._alone(lambda: check_header(self.metadata.get(HEADER), self.path))

    def _alone(self, function: Callable[[], T]) -> T:
        return self._ranks.alone(f"loading {self.path}", function)

    def _verify(self) -> None:
        """Reads every file once, each by one rank: its own where the layout is the same, so that it is cached."""
        records = self._alone(lambda: files.read_manifest(self.path))
        size, rank = self._ranks.size, self._ranks.rank
        mine = {name: record for i, (name, record) in enumerate(records.items()) if _reader(name, i) % size == rank}
        problems = [
            p for found in self._ranks.together("loading", lambda: files.damage(self.path, mine)) for p in found
        ]
        refuse_damaged(problems)

    # ------------------------------------------------------------------ the run

    def prepare_fit(self, trainer: Trainer, layout: ParallelLayout) -> None:
        """Checks that a training can go on from here, and gives each rank its position in the data.

        Raises:
            CheckpointError: On every rank, if it cannot.
        """
        saved = self.metadata.get(HEADER)
        has_optimizers = "optimizers" in saved if self.is_directory and saved else "optimizer_states" in self.metadata
        if not has_optimizers:
            raise CheckpointError(
                f"{self.path} was saved with save_weights_only=True: it has no optimizer state to go on from. To train "
                "from its weights, load them with `trainer.validate(module, dataloaders, ckpt_path=...)` and call "
                "`trainer.fit(module)` of the same trainer without ckpt_path instead."
            )
        # Lightning finds it once the model has been built, or finds nothing to train.
        begun = self.metadata["loops"]["fit_loop"]["epoch_progress"]["current"]["ready"]
        last = trainer.max_epochs
        if last is not None and 0 <= last < begun:
            raise CheckpointError(
                f"{self.path} is of epoch {begun} of its run, and this one is to end after max_epochs={last}, which "
                f"counts those before, too. Set max_epochs to {begun + last} for {last} more; to train anew, leave "
                "ckpt_path out, and give the run a directory of its own (dirpath of ModelCheckpoint)."
            )
        if self.is_directory:
            ranks = self._alone(lambda: deserialize(self.path / RANKS, weights_only=True))
            self.metadata["optimizer_states"] = []  # Lightning asks for them; `restore_optimizers` reads the tensors
        else:
            ranks = self.metadata.pop("ranks", None)
        if ranks is not None:
            rank = self._ranks.rank
            self.random = self._alone(lambda: place_ranks(self.metadata, ranks, trainer, rank, layout))
            before = self.metadata[HEADER]["layout"]
            entry = entry_of(ranks, before, rank, layout)
            saved = (entry.get("loaders"), ranks[0].get("loaders"))
            self.loaders = PlainLoaders(*saved, before["data_world_size"], layout.data_world_size)

    @property
    def bases(self) -> dict[str, dict[str, Any]]:
        """What the checkpoint says of models that it has adapters of only."""
        return self.metadata.get(HEADER, {}).get("bases", {})

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """Config of every transformers model in the module, by its name there; empty if the checkpoint does not say."""
        return self.metadata.get(HEADER, {}).get("configs", {})

    # ------------------------------------------------------------------ tensors

    def allocate(self, module: LightningModule, device: torch.device) -> None:
        """Allocates what is on meta and will be filled by `restore`, so that nobody reads or draws it before.

        Raises:
            CheckpointError: On every rank, if names or shapes differ from the checkpoint's.
        """
        saved = self.weights()
        left_out = base_names(module) - saved.keys()
        state = module.state_dict(keep_vars=True)
        named = {clean(name): value for name, value in state.items() if isinstance(value, Tensor)}
        target = {name: value for name, value in named.items() if name not in left_out}

        def compare() -> set[str]:
            check_bases(module, self.bases, self.path)
            advice = "Build the module of the run that saved it, or set `strict_loading = False` on the LightningModule"
            check_fit(target, saved, module.strict_loading, self.path, advice)
            return target.keys() & saved.keys()

        filled = [target[name] for name in self._alone(compare)]
        assign(module, {id(t): torch.empty_like(local_tensor(t), device=device) for t in filled if t.is_meta})

    def weights(self) -> dict[str, Saved]:
        """Shape and dtype of what `restore` can fill, by name."""
        if self.is_directory:
            return self._reader.weights()
        saved = self.metadata["state_dict"]
        return {clean(n): (value.shape, value.dtype) for n, value in saved.items() if isinstance(value, Tensor)}

    def restore(self, module: LightningModule) -> None:
        """Fills the module, whatever its layout, after `allocate`."""
        self._alone(lambda: check_bases(module, self.bases, self.path))  # once more, with the seed of what was drawn
        raw = module.state_dict()
        target = {clean(name): value for name, value in raw.items() if isinstance(value, Tensor)}
        with torch.no_grad():
            if self.is_directory:
                saved = self.weights()
                state = {"state_dict": {name: target[name] for name in target if name in saved}}
                read_shards(state, self._reader, self._ranks.group)
                extra = self.metadata[HEADER].get("extra_state", {})
            else:
                extra = self._alone(lambda: self._read_weights(target))
        # The tensors are filled in place already; modules with state of another kind, or hooks, see them here.
        module.load_state_dict({name: extra.get(clean(name), value) for name, value in raw.items()}, strict=False)

    def _read_weights(self, target: dict[str, Tensor]) -> dict[str, Any]:
        saved: Mapping[str, Any] = self.metadata["state_dict"]
        tensors = {clean(name): value for name, value in saved.items() if isinstance(value, Tensor)}
        for name, tensor in target.items():
            if name in tensors:
                single_file.fill(tensor, tensors[name])
        return {clean(name): value for name, value in saved.items() if not isinstance(value, Tensor)}

    # ------------------------------------------------------------------ optimizers

    def restore_optimizers(self, module: LightningModule) -> None:
        """Fills the trainer's optimizers, whatever their layout, once all their groups are there.

        Raises:
            CheckpointError: On every rank, if optimizers or schedulers differ from the checkpoint's.
        """
        with torch.no_grad():
            if self.is_directory:
                self._read_optimizers(module)
            else:
                self._alone(lambda: self._fill_optimizers(module))

    def _read_optimizers(self, module: LightningModule) -> None:
        trainer, index = module.trainer, self._reader.index()
        descriptions = self.metadata[HEADER]["optimizers"]
        state: dict[str, Any] = {}

        def allocate() -> None:
            self._check_optimizers(trainer, descriptions)
            for number, (optimizer, description) in enumerate(zip(trainer.optimizers, descriptions, strict=True)):
                prefix = f"optimizer_{number}.state."
                sizes = {split_key(n.removeprefix(prefix)): e for n, e in index.items() if n.startswith(prefix)}
                tensors = optimizers.allocate(optimizer, module, description, sizes)
                state[f"optimizer_{number}"] = {"state": tensors}

        self._alone(allocate)
        read_shards(state, self._reader, self._ranks.group)
        for number, (optimizer, description) in enumerate(zip(trainer.optimizers, descriptions, strict=True)):
            optimizers.load(optimizer, module, description, state[f"optimizer_{number}"]["state"])

    def _fill_optimizers(self, module: LightningModule) -> None:
        trainer, saved = module.trainer, self.metadata["optimizer_states"]
        self._check_optimizers(trainer, saved)
        # None in files of Lightning's other strategies, where numbers are all that there is.
        groups = (self.metadata.get(HEADER) or {}).get(optimizers.PARAMETERS)
        for number, (optimizer, state) in enumerate(zip(trainer.optimizers, saved, strict=True)):
            if groups is not None:
                state = optimizers.renumbered(optimizer, module, state, groups[number])
            single_file.load_optimizer(optimizer, state)

    def _check_optimizers(self, trainer: Trainer, saved: list[Any]) -> None:
        if len(trainer.optimizers) != len(saved):
            raise CheckpointError(
                f"this run has {len(trainer.optimizers)} optimizers and {self.path} {len(saved)}. Return the same from "
                "configure_optimizers."
            )
        classes = (self.metadata.get(HEADER) or {}).get(optimizers.CLASSES, {})
        groups = [state["param_groups"] for state in saved]
        optimizers.check_classes(trainer, classes, groups, len(self.metadata.get("lr_schedulers", [])))


def refuse_damaged(problems: list[str]) -> None:
    """Raises CheckpointError, listing all, if `files.damage` has found any."""
    if problems:
        raise CheckpointError(f"The checkpoint is damaged: {'; '.join(problems)}. Use another checkpoint.")


def _reader(name: str, number: int) -> int:
    """The rank that reads a file for its checksum: by torch's naming the one that wrote it."""
    parts = name.removeprefix("__").split("_")
    return int(parts[0]) if name.startswith("__") and parts[0].isdigit() else number


def split_key(name: str) -> tuple[str, str]:
    """Parameter name and key of an optimizer's tensor."""
    parameter, _, key = name.rpartition(".")
    return parameter, key


def check_fit(target: Mapping[str, Tensor], saved: Mapping[str, Saved], strict: bool, path: Path, advice: str) -> None:
    """Raises CheckpointError, listing all, if saved weights have other shapes or, if ``strict``, other names.

    Floating-point weights are cast to the dtype that this run's precision gives them; other dtypes must be equal.
    """
    missing, unexpected = target.keys() - saved.keys(), saved.keys() - target.keys()
    shapes, dtypes = [], []
    for name in target.keys() & saved.keys():
        tensor, (shape, dtype) = target[name], saved[name]
        if shape != tensor.shape:
            shapes.append(f"{name} {tuple(shape)} instead of {tuple(tensor.shape)}")
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            dtypes.append(f"{name} {dtype} instead of {tensor.dtype}")
    problems = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("of another shape", shapes),
            ("of another dtype", dtypes),
            ("missing", missing if strict else ()),
            ("not in the module", unexpected if strict else ()),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the module. Weights {'; '.join(problems)}. {advice} to load what fits by name."
        )
