"""What routers choose: seen, counted and steered.

`observe` is the one place that looks at routers, `tokens` knows which tokens are no padding, and `tally` counts.
`router_rules` are what users set to steer them, `steer` does it, by `losses`, `biases` and `choices` of no router.
`metrics` measure how even choices are, `watched` fills them from a model, and `pictures` draw them.
"""

from lightning_ep.routing.metrics import (
    DeadExperts,
    ExpertLoad,
    LoadVariation,
    MaxViolation,
    Measures,
    Routed,
    RouterEntropy,
    RoutingMetric,
    RoutingSummary,
    RowsPerToken,
    StragglerFactor,
)
from lightning_ep.routing.observe import MoELayer, Observation, Routing, moe_layers
from lightning_ep.routing.router_rules import (
    BalancingLoss,
    BiasUpdates,
    ForcedBalance,
    RouterRule,
    RouterZLoss,
    SkewedRouting,
)
from lightning_ep.routing.steer import freeze_routers, router_losses, steer_routers, step_routers
from lightning_ep.routing.tally import RoutingCounts, sum_over_ranks
from lightning_ep.routing.watched import Watched

__all__ = [
    "BalancingLoss",
    "BiasUpdates",
    "DeadExperts",
    "ExpertLoad",
    "ForcedBalance",
    "LoadVariation",
    "MaxViolation",
    "Measures",
    "MoELayer",
    "Observation",
    "Routed",
    "RouterEntropy",
    "RouterRule",
    "RouterZLoss",
    "Routing",
    "RoutingCounts",
    "RoutingMetric",
    "RoutingSummary",
    "RowsPerToken",
    "SkewedRouting",
    "StragglerFactor",
    "Watched",
    "freeze_routers",
    "moe_layers",
    "router_losses",
    "steer_routers",
    "step_routers",
    "sum_over_ranks",
]
