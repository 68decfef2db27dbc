"""What tells the experts of one family from those of another, in a few flags."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

CUBIC = 0.044715  # of the tanh approximation of GELU, which is x sigmoid(2 sqrt(2 / pi) (x + CUBIC x^3))
TWICE_ROOT = 2 * math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Activation:
    """``function(gate) * (up + up_offset)``, or ``function(x)`` where nothing is gated. The default is SwiGLU.

    Attributes:
        function: ``"silu"`` (``x sigmoid(alpha x)``), ``"gelu_tanh"`` or ``"relu2"`` (squared ReLU).
        gated: The first projection gives a gate and what it gates, each ``[P, I]``; otherwise one ``[P, I]``.
        interleaved: Gate and up take turns, column by column, instead of lying side by side.
        alpha: Of SiLU.
        limit: Before all else the gate (or ``x``) is clamped from above, and up on both sides.
        up_offset: Added to up behind the clamp.
    """

    function: Literal["silu", "gelu_tanh", "relu2"] = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def width(self, h_PF: Tensor) -> int:
        """``I``, of the result."""
        return h_PF.shape[1] // 2 if self.gated else h_PF.shape[1]


class ExpertBias(NamedTuple):
    """Added to the projection before the activation.

    Attributes:
        bias_EF: ``[E, F]``.
        ids_NK: Integer ``[N, K]``, the expert of each slot.
    """

    bias_EF: Tensor
    ids_NK: Tensor


@dataclass(frozen=True)
class ExpertForm:
    """What tells the experts of one family from those of another; the default is Mixtral's, and most others'.

    Attributes:
        activation: What is between the two projections.
        is_transposed: Weights are ``[E, in, out]`` instead of ``[E, out, in]``.
        has_bias: Each projection has a bias, ``[E, out]``.
    """

    activation: Activation = field(default_factory=Activation)
    is_transposed: bool = False
    has_bias: bool = False

    @property
    def num_params(self) -> int:
        """The weights up and down, and behind them their biases."""
        return 4 if self.has_bias else 2
