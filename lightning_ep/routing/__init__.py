"""What routers choose: seen, counted and steered.

`observe` is the one place that looks at routers, `tokens` knows which tokens are no padding, and `counts` adds up.
"""

from lightning_ep.routing.counts import RoutingCounts, sum_over_ranks
from lightning_ep.routing.observe import MoELayer, Observation, Routing, moe_layers

__all__ = ["MoELayer", "Observation", "Routing", "RoutingCounts", "moe_layers", "sum_over_ranks"]
