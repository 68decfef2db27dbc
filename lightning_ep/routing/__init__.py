"""What routers choose: seen, counted and steered.

`observe` is the one place that looks at routers, `tokens` knows which tokens are no padding, and `counts` adds up.
`rules` are what users set to steer them, `steering` does it, by `losses`, `biases` and `choices` that no router made.
"""

from lightning_ep.routing.counts import RoutingCounts, sum_over_ranks
from lightning_ep.routing.observe import MoELayer, Observation, Routing, moe_layers
from lightning_ep.routing.rules import (
    BalancingLoss,
    BiasUpdates,
    ForcedBalance,
    RouterRule,
    RouterZLoss,
    SkewedRouting,
)
from lightning_ep.routing.steering import freeze_routers, router_losses, steer_routers, step_routers

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
