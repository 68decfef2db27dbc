"""Parts of a model that keep their weights while the rest is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter


@dataclass(frozen=True)
class _Frozen:
    """What is remembered of a model: the names of its modules that were frozen."""

    names: tuple[str, ...]


def freeze_parts(model: PreTrainedModel, names: Sequence[str] | None) -> None:
    """Leaves weights as they are: no optimizer trains them. Before the model is sharded.

    Args:
        model: The model.
        names: Modules, with ``*`` for any part of a name. None: the towers for images and sound, without what projects
            their output into the text.

    Raises:
        ValueError: If there is no module of a name.
    """
    frozen = []
    if names is None:
        for name, tower in adapter.towers(model).items():
            tower.requires_grad_(False)
            for inner, child in tower.named_children():
                child.requires_grad_(adapter.projects(inner))
            frozen.append(name)
    modules = dict(model.named_modules())
    for pattern in names or ():
        found = [name for name in modules if name and fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(
                f"freeze={list(names or ())}: {type(model).__name__} has no module {pattern!r}"
                f"{adapter.near(pattern, modules)}. Names are those of the model's modules, such as model.visual."
            )
        for name in found:
            modules[name].requires_grad_(False)
        frozen += found
    adapter.remember(model, _Frozen(tuple(frozen)))


def frozen_parts(module: nn.Module) -> tuple[str, ...]:
    """The names of modules that `freeze_parts` has frozen in the models of a module."""
    found = (adapter.recall(model, _Frozen) for model in adapter.pretrained_models(module).values())
    return tuple(name for frozen in found if frozen is not None for name in frozen.names)
