"""Adapters on experts: which module around the experts holds what of them, and in which form.

PEFT holds the factors of all experts flat, as the weights of two linear layers: A as ``(E R, in)``, the rows of one
expert after the other, and B as ``(out, R E)``, whose columns go through the experts for each number of the rank. B
does not split by experts, so a sharded model has ``[E, R, in]`` and ``[E, out, R]``, under PEFT's names, and files have
what PEFT has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.ops.low_rank import Adapter


class ExpertFactor(nn.Module):
    """A or B of all experts, in the place of PEFT's linear layer.

    Args:
        flat: The weight as PEFT has it.
        num_experts: ``E``.
        is_a: Which of the two it is.
        init: ``init_lora_weights`` of the LoraConfig.
    """

    def __init__(self, flat: nn.Parameter, num_experts: int, is_a: bool, init: bool | str) -> None:
        super().__init__()
        self.num_experts, self.is_a, self._init = num_experts, is_a, init
        weight = per_expert(flat.detach(), num_experts, is_a).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=flat.requires_grad)

    def reset_parameters(self) -> None:
        """Draws the weight, or as many experts of it as are there, by PEFT's rule."""
        rank, size = (self.weight.shape[1], self.weight.shape[2]) if self.is_a else (self.weight.shape[2], 0)
        if self.is_a and self._init == "gaussian":
            nn.init.normal_(self.weight, std=1 / rank)
        elif self.is_a:
            nn.init.uniform_(self.weight, -1 / math.sqrt(size), 1 / math.sqrt(size))  # kaiming's with a = sqrt(5)
        elif self._init is False:
            bound = 1 / math.sqrt(rank * self.num_experts)  # of a linear layer with so many features
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.zeros_(self.weight)


def per_expert(flat: Tensor, num_experts: int, is_a: bool) -> Tensor:
    """PEFT's ``(E R, in)`` as ``[E, R, in]``, or ``(out, R E)`` as ``[E, out, R]``; a view."""
    if is_a:
        return flat.unflatten(0, (num_experts, -1))
    return flat.unflatten(1, (-1, num_experts)).permute(2, 0, 1)


def flat(weight: Tensor, is_a: bool) -> Tensor:
    """The reverse of `per_expert`."""
    return weight.flatten(0, 1) if is_a else weight.permute(1, 2, 0).flatten(1)


@dataclass(frozen=True)
class Factors:
    """The two factors beside one parameter of the experts.

    Attributes:
        parameter: The parameter's name.
        a: Holds A as ``weight``, ``[E, R, in]``.
        b: Holds B as ``weight``, ``[E, out, R]``.
        rank: ``R``.
        scale: Of the product ``B A``.
    """

    parameter: str
    a: nn.Module
    b: nn.Module
    rank: int
    scale: float


@dataclass(frozen=True)
class AdaptedExperts:
    """Experts inside of modules that hold adapters of them; `remember`ed on the outermost one, which is called.

    Attributes:
        inside: The experts themselves.
        factors: What is beside their parameters.
        are_off: Whether a forward leaves the adapters out.
    """

    inside: nn.Module
    factors: tuple[Factors, ...]
    are_off: Callable[[], bool]

    def adapters(self, param_names: tuple[str, ...]) -> list[Adapter]:
        """The adapters by the places of their parameters."""
        return [Adapter(param_names.index(f.parameter), f.rank, f.scale) for f in self.factors]

    @property
    def holders(self) -> list[nn.Module]:
        """The modules that hold the factors: A and B of each parameter."""
        return [module for factors in self.factors for module in (factors.a, factors.b)]


def experts_in(module: nn.Module) -> nn.Module:
    """The experts themselves: what a plan names, or what is inside of its adapters."""
    adapted = adapter.recall(module, AdaptedExperts)
    return module if adapted is None else adapted.inside
