"""Adapters on experts: which module around the experts holds what of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_ep import transformers_adapter as adapter
from lightning_ep.ops.low_rank import Adapter


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
