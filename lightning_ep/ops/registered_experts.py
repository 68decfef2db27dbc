"""Experts that run any function of transformers' experts interface and let autograd differentiate it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from typing_extensions import override

from lightning_ep.ops.eval_mode import evaluated
from lightning_ep.ops.local_experts import LocalExperts
from lightning_ep.ops.low_rank import Adapter, split
from lightning_ep.ops.one_by_one import check_one_by_one
from lightning_ep.ops.permute import ExpertOrder, expert_order, gather_sum

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def stand_in(
    module: nn.Module, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None] | None = None
) -> nn.Module:
    """A module like ``module`` with other tensors under its names; hooks are not run by it.

    Submodules are shared, but for those of ``name.of.parameter`` among the parameters, which have stand-ins too. Unlike
    `copy.copy` it works on modules that FSDP2 wraps, and costs two dictionary copies.
    """
    other: nn.Module = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__["_parameters"] = {name: value for name, value in parameters.items() if "." not in name}
    if buffers is not None:
        other.__dict__["_buffers"] = dict(buffers)
    inside: dict[str, dict[str, Tensor | None]] = {}
    for child, _, name in (name.partition(".") for name in parameters if "." in name):
        inside.setdefault(child, {})[name] = parameters[f"{child}.{name}"]
    if inside:
        other.__dict__["_modules"] = dict(module._modules)
        for child, found in inside.items():
            replaced = other.__dict__["_modules"][child] = stand_in(module.get_submodule(child), found)
            replaced.__dict__.update({hooks: {} for hooks in _HOOKS})  # it is called, where this module's function is
    return other


def _pack(tensor: Tensor) -> Tensor:
    # Not the tensor itself: a graph that holds an output of its own is never freed, unless a backward runs through it.
    return tensor.data


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


class _Routing(NamedTuple):
    ids_NK: Tensor
    weights_NK: Tensor
    num_pairs: int


class _Forward(NamedTuple):
    order: ExpertOrder
    weights_dtype: torch.dtype
    leaves: tuple[Tensor, ...]  # rows and weights of the pairs, then the parameters; frozen ones need no gradient
    out_PH: Tensor


class RegisteredExperts(LocalExperts):
    """Runs a registered function on (row, expert) pairs; records its graph in forward and backward differentiates it.

    Args:
        module: The experts module, already reduced to the local experts (``num_experts`` is the local count). Its
            hooks are not run: parameters come as arguments of the calls. Of its own it is only asked which are frozen.
        function: ``fn(module, hidden [P, H], top_k_index [P, 1], top_k_weights [P, 1]) -> [P, H]``.
        param_names: Names of the parameters of ``module``, in the order in which calls pass them.
        adapters: Those of the weights, by their places in ``param_names``. The function sees ``W + scale * B A``, of
            which it makes whole gradients.
        factors: The modules that hold A and B of each adapter as ``weight``, which are asked like ``module``.
        unknown: Name of the layer, if the function is one of a user's own: its first call looks whether it may be
            called with one expert per row.
    """

    keeps_rows = False

    def __init__(
        self,
        module: nn.Module,
        function: ExpertsFunction,
        param_names: Sequence[str],
        adapters: Sequence[Adapter] = (),
        factors: Sequence[nn.Module] = (),
        unknown: str | None = None,
    ) -> None:
        self._module = module
        self._factors = tuple(factors)
        self._is_transposed = bool(getattr(module, "is_transposed", False))
        self._adapters = tuple(adapters)
        self._template = stand_in(module, {})
        self._num_experts: int = module.num_experts  # type: ignore[assignment]
        self._function = function
        self._param_names = tuple(param_names)
        self._layer = unknown
        self._is_known = unknown is None

    @override
    def forward(
        self,
        rows_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        num_pairs: int,
        params: Sequence[Tensor],
        keep: bool,
    ) -> tuple[Tensor, _Forward | _Routing]:
        if not self._is_known:
            self._look(rows_NH, params)
            self._is_known = True
        order = expert_order(ids_NK, self._num_experts, num_pairs)
        x_PH = order.permute(rows_NH)
        weights_P = weights_NK.reshape(-1)[order.slot_P].to(rows_NH.dtype)
        expert_P = ids_NK.reshape(-1)[order.slot_P].long()
        # Outside of the caller's hooks: activation checkpointing would replay the whole layer a second time for this
        # inner graph, after FSDP has reduced the experts' gradients, and leave them gathered with stale weights.
        with torch.set_grad_enabled(keep), saved_tensors_hooks(_pack, _unpack):
            needed = (True, True, *self._trained()[: len(params)])
            inputs = zip((x_PH, weights_P, *params), needed, strict=True)
            leaves = tuple(t.detach().requires_grad_(keep and needs) for t, needs in inputs)
            # A stand-in per call: recompute or two models in flight must not see each other's parameters.
            module = stand_in(self._template, dict(zip(self._param_names, self._weights(leaves[2:]), strict=True)))
            out_PH = self._call(module, leaves[0], expert_P.unsqueeze(1), leaves[1].unsqueeze(1))
        out_NH = gather_sum(out_PH.detach(), order.pair_NK, rows_NH.dtype)
        if not keep:
            return out_NH, _Routing(ids_NK, weights_NK, num_pairs)
        return out_NH, _Forward(order, weights_NK.dtype, leaves, out_PH)

    def _look(self, rows_NH: Tensor, params: Sequence[Tensor]) -> None:
        assert self._layer is not None
        weights = (weight.detach() for weight in self._weights(params))
        module = stand_in(self._template, dict(zip(self._param_names, weights, strict=True)))
        with evaluated(module):
            check_one_by_one(
                lambda rows, ids, weights: self._call(module, rows, ids, weights),
                self._num_experts,
                rows_NH.shape[1],
                rows_NH.dtype,
                rows_NH.device,
                self._layer,
            )

    def _call(self, module: nn.Module, rows: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        try:
            return self._function(module, rows, ids, weights)
        except IndexError as error:
            if self._layer is None:
                raise
            raise IndexError(
                f"{error}: the experts of {self._layer} were called for the {self._num_experts} of them that are here. "
                "Let their forward ask how many they are by `len` of a parameter, or by an attribute whose name ends "
                "with `experts`, which has the number of this rank's (docs/extend/plans.md)."
            ) from error

    def _trained(self) -> list[bool]:
        # Of the module's own: those that calls pass may be casts, made where no gradient is recorded.
        own = [self._module.get_parameter(name) for name in self._param_names]
        return [param.requires_grad for param in (*own, *(factor.get_parameter("weight") for factor in self._factors))]

    def _weights(self, params: Sequence[Tensor]) -> list[Tensor]:
        weights, beside = split(params, len(self._param_names), self._adapters)
        return [
            weight if low is None else low.beside(weight, self._is_transposed)
            for weight, low in zip(weights, beside, strict=True)
        ]

    @override
    def backward_rows(
        self,
        saved: _Forward | _Routing,
        params: Sequence[Tensor],
        grad_NH: Tensor,
        rows: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
        if isinstance(saved, _Routing):
            assert rows is not None
            # Which of its tensors the function's own backward needs is not known, so all of it runs again.
            saved = self.forward(rows(), *saved, params, keep=True)[1]
            assert isinstance(saved, _Forward)
        order = saved.order
        grad_PH = order.permute(grad_NH).to(saved.out_PH.dtype)
        needed = [leaf for leaf in saved.leaves if leaf.requires_grad]
        found = torch.autograd.grad(saved.out_PH, needed, grad_PH, allow_unused=True, materialize_grads=True)
        grad_x_PH, grad_weights_P, *grads = found
        left = iter(grads)
        grad_params = tuple(next(left) if leaf.requires_grad else None for leaf in saved.leaves[2:])
        grad_weights = grad_weights_P.new_zeros(order.pair_NK.numel(), dtype=saved.weights_dtype)
        grad_weights[order.slot_P] = grad_weights_P.to(saved.weights_dtype)
        grad_NH = gather_sum(grad_x_PH, order.pair_NK, grad_NH.dtype)
        return grad_NH, grad_weights.view(order.pair_NK.shape), grad_params

    @override
    def backward_params(
        self, saved: tuple[Tensor | None, ...], dtypes: Sequence[torch.dtype | None]
    ) -> tuple[Tensor | None, ...]:
        return tuple(
            None if grad is None or dtype is None else grad.to(dtype) for grad, dtype in zip(saved, dtypes, strict=True)
        )
