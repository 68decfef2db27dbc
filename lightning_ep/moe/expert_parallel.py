"""The expert plan: which modules hold experts, and the style that shards them over the EP dimension of the mesh."""

from __future__ import annotations

import inspect
from functools import cache

from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.progress import Progress
from lightning_ep.layout import ParallelLayout
from lightning_ep.moe.adapted import AdaptedExperts, experts_in
from lightning_ep.moe.dispatch import build_dispatcher
from lightning_ep.moe.experts import ExpertContext, holder_of, is_parallel_experts, spread_over_ranks
from lightning_ep.ops.expert_form import ExpertForm
from lightning_ep.ops.fused_experts import FusedExperts
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.registered_experts import RegisteredExperts


class ExpertParallel(ParallelStyle):
    """Whole experts per rank: ``Shard(0)`` over the EP mesh, reached by the dispatcher.

    For `torch.distributed.tensor.parallel.parallelize_module`, on the experts module of a transformers MoE block and
    with a 1-D mesh (the ``"ep"`` dimension).

    Args:
        layer: Name of the layer, for messages.
        experts_implementation: Local kernel: ``"fused"`` (ours), ``"eager"`` or a name in transformers' experts
            interface; ``"auto"`` is the fused one for the experts that it can serve.
        progress: Where the ranks note what they wait for; a new one by default.
    """

    def __init__(
        self,
        layer: str = "experts",
        experts_implementation: str = "auto",
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.experts_implementation = experts_implementation
        self.progress = progress or Progress()

    def validate(self, module: nn.Module, num_ranks: int) -> None:
        """Raises ValueError, before anything is sharded, if ``module`` cannot be split over ``num_ranks``."""
        if is_parallel_experts(module):
            raise ValueError(f"{self.layer} is spread over ranks already: `parallelize` is called once for a model.")
        experts = experts_in(module)
        wrapped = [name for name, param in experts.named_parameters() if "." in name and param.ndim > 2]
        if wrapped:
            raise ValueError(
                f"{self.layer} is a {type(module).__name__} around the experts ({wrapped[0]}), and only experts "
                "themselves can be split over ranks, or experts inside of PEFT's LoRA (`target_parameters`)."
            )
        kind = type(experts).__name__
        num_experts = adapter.number_of_experts(experts)
        if num_experts is None:
            raise ValueError(
                f"{self.layer} ({kind}) does not say how many experts it has: it has no `num_experts`, and its "
                "parameters are of different lengths in front, or it has none. Experts that are modules one by one "
                "(an nn.ModuleList) are to be stacked into parameters of shape [experts, ...]."
            )
        _check_forward(experts, self.layer)
        ParallelLayout(num_ranks, ep=num_ranks).check_num_experts(num_experts, self.layer)
        shared = adapter.shared_by_experts(experts)
        for name, param in experts.named_parameters():
            if name in shared:
                continue
            if "." in name or param.ndim < 2 or param.shape[0] != num_experts:
                raise ValueError(
                    f"{self.layer}.{name} of shape {tuple(param.shape)} has no expert dimension of size {num_experts} "
                    "in front, so it cannot be split over experts. Stack the weights of all experts into parameters of "
                    "shape [experts, ...], held by a module whose forward takes hidden states, ids and weights."
                )
        for name, buffer in experts.named_buffers():
            if buffer.ndim > 0 and buffer.shape[0] == num_experts and not adapter.picks_its_implementation(experts):
                raise ValueError(
                    f"{self.layer}.{name} of shape {tuple(buffer.shape)} is a buffer with a row per expert, and a rank "
                    "holds some of the experts, with ids of its own. Make it a parameter with `requires_grad=False`, "
                    "of shape [experts, 1] at least, or keep it in the module around the experts."
                )
        if self.experts_implementation == "fused":
            reason = adapter.why_not_fused(experts)
            if reason is not None:
                raise ValueError(
                    f"experts_implementation='fused' cannot serve {self.layer}: {reason}. Use 'auto', which takes "
                    "transformers' kernels for such experts."
                )
        else:
            adapter.local_experts_function(experts, self.experts_implementation)

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.validate(module, device_mesh.size())
        inside, adapted = experts_in(module), adapter.recall(module, AdaptedExperts)
        num_experts = adapter.number_of_experts(inside)
        assert num_experts is not None
        dispatcher = build_dispatcher(num_experts, device_mesh.get_group(), self.layer, self.progress)
        num_local = dispatcher.num_local_experts
        form, names = self._form(inside)
        shared = adapter.shared_by_experts(inside)
        factors = [] if adapted is None else adapted.holders
        adapters = [] if adapted is None else adapted.adapters(names)
        params = tuple((inside, name) for name in names) + tuple((holder, "weight") for holder in factors)
        for holder, name in params:
            _keep_local(holder, name, device_mesh, num_local)
        _say_number(inside, num_experts, num_local)
        experts: LocalExperts
        if form is not None:
            experts = FusedExperts(num_local, adapters, form)
        else:
            function = adapter.local_experts_function(inside, self.experts_implementation)
            unknown = None if adapter.picks_its_implementation(inside) else self.layer
            experts = RegisteredExperts(inside, function, (*names, *shared), adapters, factors, unknown)
        holders = tuple(holder_of(inside, name) for name in shared)
        are_off = None if adapted is None else adapted.are_off
        spread_over_ranks(module, ExpertContext(dispatcher, experts, params, len(names), holders, are_off))
        return module

    def _form(self, module: nn.Module) -> tuple[ExpertForm | None, tuple[str, ...]]:
        """What the fused experts must know, None where others run; and the parameters, in the order of calls."""
        fused = self.experts_implementation in ("auto", "fused")
        reason = adapter.why_not_fused(module) if fused else None
        if reason is not None:
            if adapter.picks_its_implementation(module):
                how = f"transformers' kernels, and not by the fused experts: {reason}. Both are exact."
            else:
                how = "its own forward, as experts of one's own do, and not by the fused experts."
            _say_once(f"{type(module).__name__} computes by {how}")
        if fused and reason is None:
            return adapter.fused_form(module)
        return None, tuple(name for name, _ in module.named_parameters(recurse=False))


def _keep_local(holder: nn.Module, name: str, mesh: DeviceMesh, num_local: int) -> None:
    """Makes a parameter, which every rank holds, one of which this rank holds ``num_local`` experts."""
    param = holder.get_parameter(name)
    # Nothing is scattered: a copy of the slice lets the rest go.
    local = param.detach().narrow(0, mesh.get_local_rank() * num_local, num_local).clone()
    shards = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    holder.register_parameter(name, nn.Parameter(shards, requires_grad=param.requires_grad))


def _check_forward(experts: nn.Module, layer: str) -> None:
    """Raises ValueError unless the forward may be called with hidden states, ids and weights."""
    try:
        inspect.signature(type(experts).forward).bind(experts, "hidden", "ids", "weights")
    except TypeError as error:
        raise ValueError(
            f"{layer} ({type(experts).__name__}) cannot be called as experts are: forward(hidden [tokens, size], ids "
            f"[tokens, top_k], weights [tokens, top_k]) -> [tokens, size]; {error}. If the router is in this module, "
            "too, move the stacked weights and what computes with them into one of their own (docs/extend/plans.md)."
        ) from None


def _say_number(experts: nn.Module, all_of_them: int, local: int) -> None:
    """Has the module's own forward count this rank's experts, under whatever name it has their number."""
    for name, value in list(vars(experts).items()):
        if name.endswith("experts") and isinstance(value, int) and value == all_of_them:
            setattr(experts, name, local)
    experts.num_experts = local  # type: ignore[assignment]


@cache
def _say_once(message: str) -> None:
    rank_zero_info(message)


def expert_plan(
    model: nn.Module,
    experts_implementation: str = "auto",
    progress: Progress | None = None,
) -> dict[str, ParallelStyle]:
    """The plan that `parallelize_module` takes to shard the experts of a model, and nothing else.

    It is read from the model's own ``base_model_ep_plan`` (transformers), so that every family that declares one
    works; attention is never in it.

    Args:
        model: A transformers MoE, or a module that contains some.
        experts_implementation: As in `ExpertParallel`.
        progress: As in `ExpertParallel`.

    Raises:
        ValueError: If there is no transformers model, or none of them has experts that its plan names.
    """
    models = adapter.called_models(model)
    if not models:
        raise ValueError(
            f"{type(model).__name__} contains no transformers model, so there are no experts to parallelise. Assign "
            "one to an attribute in `configure_model` (or in `__init__`), or name the experts of a model of plain "
            'PyTorch: plan={"model.layers.*.moe.experts": "experts"}.'
        )
    plan: dict[str, ParallelStyle] = {}
    progress = progress or Progress()  # one of all layers
    for outer, pretrained in models.items():
        for name in adapter.experts_modules(pretrained):
            full_name = f"{outer}.{name}" if outer else name
            plan[full_name] = ExpertParallel(full_name, experts_implementation, progress)
    if not plan:  # a dense model beside one with experts (a teacher, a tower) is sharded like the rest of that
        dense = next(iter(models.values()))
        raise ValueError(
            f"{type(dense).__name__} ({dense.config.model_type!r}) has no experts to parallelise: its config declares "
            "no expert-parallel plan (`base_model_ep_plan`), or the plan matches none of its modules. If it has "
            'experts whose parameters have them in front, name them: plan={"model.layers.*.mlp.experts": "experts"} '
            "(see docs/extend/plans.md). Or use a mixture-of-experts model that declares them, or Lightning's "
            "FSDPStrategy for a dense one."
        )
    return plan
