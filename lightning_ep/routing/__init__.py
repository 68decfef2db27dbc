"""What routers choose: seen, counted and steered.

`observe` is the one place that looks at routers, `tokens` knows which tokens are no padding, and `tally` counts.
`router_rules` are what users set to steer them, `steer` does it, by `losses`, `biases` and `choices` of no router.
"""

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

__all__ = [
    "BalancingLoss",
    "BiasUpdates",
    "ForcedBalance",
    "MoELayer",
    "Observation",
    "RouterRule",
    "RouterZLoss",
    "Routing",
    "RoutingCounts",
    "SkewedRouting",
    "freeze_routers",
    "moe_layers",
    "router_losses",
    "steer_routers",
    "step_routers",
    "sum_over_ranks",
]
