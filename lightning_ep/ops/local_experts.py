"""The experts of one rank as a forward/backward pair that an autograd Function can order.

`LocalExperts` is the seam behind which the local kernel may change: `moe.py` calls `forward` and later `backward`, and
knows nothing of GEMMs. This one runs any function of transformers' experts interface; it records that function's
graph in forward and differentiates it in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_ep.ops.permute import ExpertOrder, expert_order, gather_sum

ExpertsFunction = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def _keep(tensor: Tensor) -> Tensor:
    return tensor


def stand_in(
    module: nn.Module, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None] | None = None
) -> nn.Module:
    """A module like ``module`` with other tensors under its names; submodules are shared, hooks are not run by it.

    Unlike `copy.copy` it works on modules that FSDP2 wraps, and costs two dictionary copies.
    """
    other: nn.Module = object.__new__(type(module))
    other.__dict__.update(module.__dict__)
    other.__dict__["_parameters"] = dict(parameters)
    if buffers is not None:
        other.__dict__["_buffers"] = dict(buffers)
    return other


class SavedExperts(NamedTuple):
    """What `LocalExperts.backward` needs of a forward: the pairs' order and the leaves and result of their graph."""

    order: ExpertOrder
    leaves: tuple[Tensor, ...]
    out_PH: Tensor
    num_slots: int


class LocalExperts:
    """Runs the experts that this rank holds on the rows it received.

    Args:
        module: The experts module, already reduced to the local experts (``num_experts`` is the local count). Its
            hooks are not run: parameters come as arguments of the calls.
        function: ``fn(module, hidden [P, H], top_k_index [P, 1], top_k_weights [P, 1]) -> [P, H]``.
        param_names: Names of the parameters of ``module``, in the order in which calls pass them.
    """

    def __init__(self, module: nn.Module, function: ExpertsFunction, param_names: Sequence[str]) -> None:
        self._template = stand_in(module, {})
        self._function = function
        self._param_names = tuple(param_names)

    def forward(
        self,
        rows_NH: Tensor,
        ids_NK: Tensor,
        weights_NK: Tensor,
        num_pairs: int,
        params: Sequence[Tensor],
        needs_grad: bool,
    ) -> tuple[Tensor, SavedExperts | None]:
        """Computes every row's weighted sum over its local experts.

        Args:
            rows_NH: Received rows ``[N, H]``.
            ids_NK: int64 ``[N, K]``, local expert ids, ``num_experts`` in empty slots.
            weights_NK: ``[N, K]``, routing weights.
            num_pairs: Number of slots that are not empty.
            params: The local parameters.
            needs_grad: Whether `backward` will be called.

        Returns:
            ``[N, H]`` in at least fp32, and what `backward` needs.
        """
        order = expert_order(ids_NK, num_pairs)
        if num_pairs == 0:
            # The eager experts return no gradient path for zero rows; the caller then hands out zero gradients.
            return gather_sum(rows_NH, order.pair_NK[:, :0]), None
        x_PH = rows_NH[order.row_P]
        weights_P = weights_NK[order.row_P, order.slot_P].to(rows_NH.dtype)
        # Outside of the caller's hooks: activation checkpointing would replay the whole layer a second time for this
        # inner graph, after FSDP has reduced the experts' gradients, and leave them gathered with stale weights.
        with torch.set_grad_enabled(needs_grad), saved_tensors_hooks(_keep, _keep):
            leaves = tuple(t.detach().requires_grad_(needs_grad) for t in (x_PH, weights_P, *params))
            # A stand-in per call: recompute or two models in flight must not see each other's parameters.
            module = stand_in(self._template, dict(zip(self._param_names, leaves[2:], strict=True)))
            out_PH = self._function(module, leaves[0], order.expert_P.unsqueeze(1), leaves[1].unsqueeze(1))
        rows_out_NH = gather_sum(out_PH.detach(), order.pair_NK)
        return rows_out_NH, SavedExperts(order, leaves, out_PH, weights_NK.shape[1]) if needs_grad else None

    def backward(self, saved: SavedExperts, grad_NH: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Differentiates one forward.

        Args:
            saved: What `forward` returned.
            grad_NH: ``[N, H]``, gradient of the rows that forward returned.

        Returns:
            Gradients of the rows ``[N, H]`` (at least fp32), of the routing weights ``[N, K]`` and of the parameters.
        """
        order = saved.order
        grad_PH = grad_NH[order.row_P].to(saved.out_PH.dtype)
        grads = torch.autograd.grad(saved.out_PH, saved.leaves, grad_PH, allow_unused=True, materialize_grads=True)
        grad_weights_NK = grads[1].new_zeros(order.pair_NK.shape)
        grad_weights_NK[order.row_P, order.slot_P] = grads[1]
        return gather_sum(grads[0], order.pair_NK), grad_weights_NK, grads[2:]
