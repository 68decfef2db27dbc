"""Plans of one's own: which modules are experts where no model declares it, in transformers models or plain PyTorch.

A module whose parameters all have the experts in front, ``[E, ...]``, and whose forward takes ``(hidden [T, H], ids
[T, K], weights [T, K])`` and returns the weighted sums ``[T, H]``, is what `ExpertParallel` can spread: a rank calls
that forward with its own experts, ids that count from its first one, and one expert per row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.progress import Progress
from lightning_ep.moe.expert_parallel import ExpertParallel, expert_plan

EXPERTS = "experts"
OwnPlan = Mapping[str, str | ParallelStyle]
"""Style, or ``"experts"`` for that of this package, by the name of a module or a pattern with ``*`` for one part."""


def check_plan(plan: OwnPlan | None, experts_implementation: str = "auto") -> None:
    """Raises ValueError for styles that do not exist, and for kernels that are named beside styles with their own."""
    for name, style in (plan or {}).items():
        if style != EXPERTS and not isinstance(style, ParallelStyle):
            raise ValueError(
                f"the plan has {style!r} for {name!r}, and a style is {EXPERTS!r} (whole experts per rank) or a "
                "ParallelStyle as `lightning_ep.expert_plan` returns them."
            )
        if style != EXPERTS and experts_implementation != "auto":
            raise ValueError(
                f"experts_implementation={experts_implementation!r} beside a plan would change nothing: the styles of "
                f"the plan say which kernels run. Pass it to them: `expert_plan(model, {experts_implementation!r})`."
            )


def has_experts(module: nn.Module, plan: OwnPlan | None) -> bool:
    """Whether ``module`` holds a transformers model, or anything that its own plan names."""
    return bool(adapter.pretrained_models(module) or any(_matches(module, pattern) for pattern in plan or {}))


def resolve_plan(
    module: nn.Module,
    plan: OwnPlan | None,
    experts_implementation: str = "auto",
    progress: Progress | None = None,
    is_called: bool = True,
) -> dict[str, ParallelStyle]:
    """The style of each experts module, by its name in ``module``: what the models declare, or what ``plan`` says.

    Notes on the models whose experts ``plan`` names, which is all that others know of it.

    Args:
        module: A module with a transformers model or, with ``plan``, any model inside.
        plan: A plan of one's own. Names and patterns are those of `named_modules` of ``module``, or of a transformers
            model in it. None or empty: the models' own.
        experts_implementation: As in `ExpertParallel`, for ``"experts"``.
        progress: As in `ExpertParallel`, for ``"experts"``.
        is_called: Whether ``module`` itself is called, and not only what is inside (as by a LightningModule's steps).

    Raises:
        ValueError: If a pattern matches nothing; without ``plan`` as `expert_plan`.
    """
    if not plan:
        return expert_plan(module, experts_implementation, progress)
    check_plan(plan, experts_implementation)
    found: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        names = _matches(module, pattern)
        if not names:
            raise ValueError(_unmatched(module, pattern))
        for name in names:
            found[name] = (
                style if isinstance(style, ParallelStyle) else ExpertParallel(name, experts_implementation, progress)
            )
    by_model: dict[str, list[str]] = {}
    for name in found:
        model = _model_around(module, name, is_called)
        by_model.setdefault(model, []).append(name.removeprefix(f"{model}.") if model else name)
    for model, inner in by_model.items():
        adapter.plan_experts(module.get_submodule(model), inner)
    return found


def _matches(module: nn.Module, pattern: str) -> list[str]:
    match = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+")).fullmatch
    models = [f"{name}." if name else "" for name in adapter.pretrained_models(module)]
    names = [name for name, _ in module.named_modules()]
    inside = {name: [name.removeprefix(outer) for outer in models if name.startswith(outer)] for name in names}
    return [name for name in names if name and any(map(match, (name, *inside[name])))]


def _unmatched(module: nn.Module, pattern: str) -> str:
    names = {re.sub(r"(?<![^.])\d+(?![^.])", "*", name): child for name, child in module.named_modules() if name}
    stacked = [n for n, child in names.items() if any(p.ndim > 2 for p in child.parameters(recurse=False))]
    experts = f" Modules whose parameters may have experts in front: {', '.join(stacked[:3])}." if stacked else ""
    return (
        f"the plan's {pattern!r} matches no module of {type(module).__name__}{adapter.near(pattern, names)}. Names are "
        "those of `named_modules()`, of the module or of the transformers model in it; `*` stands for one part of a "
        f"name.{experts}"
    )


def _model_around(module: nn.Module, name: str, is_called: bool) -> str:
    """The name of the model that holds the experts ``name``: a transformers model or, of plain PyTorch, what is called.

    That is the largest module around which no list of modules, no transformers model and nothing uncalled is.
    """
    parts = name.split(".")
    around = [".".join(parts[:length]) for length in range(len(parts))]
    modules: dict[str, Any] = {outer: module.get_submodule(outer) for outer in around}
    called = adapter.called_models(module)
    for outer in modules:
        if outer in called:
            return outer
    for outer, child in modules.items():
        holds_model = any(isinstance(inner, PreTrainedModel) for inner in child.modules())
        if not holds_model and adapter.can_be_called(child) and (outer or is_called):
            return outer
    raise ValueError(
        f"the experts {name} are in no module that is called in forward: put them and their router into an nn.Module "
        "of yours (the MoE layer), whose forward calls them."
    )
