"""What steers routers: small objects of which a run has any number, each with a name in the logs."""

from __future__ import annotations

from typing import Any


class RouterRule:
    """One way to steer routers; of each kind a model has one at most. `CausalLM` takes them as ``router``."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = object.__hash__


class BalancingLoss(RouterRule):
    """Adds the balancing loss of Switch Transformers (Fedus et al., 2021, eq. 4 to 6) over the global micro-batch.

    ``E sum_e f_e P_e`` of a layer with E experts, averaged over layers: ``f_e`` is the share of tokens that chose
    expert e, of ``K`` each, and ``P_e`` the mean of its routing probability. Both are those of all ranks' tokens that
    are no padding, as in Qiu et al., 2025 ("Demons in the Detail"): balance is asked of a whole micro-batch, so that
    experts may specialise within it. Balanced routers have the value K, as with transformers' ``router_aux_loss_coef``.
    Logged as ``train/router_balance``, without the coefficient.

    Args:
        coefficient: What the loss is multiplied by.
    """

    def __init__(self, coefficient: float = 1e-3) -> None:
        self.coefficient = _positive(self, coefficient=coefficient)


class RouterZLoss(RouterRule):
    """Adds the router z-loss of ST-MoE (Zoph et al., 2022, eq. 5), which keeps router logits small.

    The mean over tokens that are no padding, of all ranks, and over layers of ``logsumexp(logits) ** 2``.
    Logged as ``train/router_z``, without the coefficient.

    Args:
        coefficient: What the loss is multiplied by.
    """

    def __init__(self, coefficient: float = 1e-3) -> None:
        self.coefficient = _positive(self, coefficient=coefficient)


class BiasUpdates(RouterRule):
    """Balances without a loss (Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing"): biases on what is chosen.

    After each optimizer step the bias of an expert rises by ``rate`` if fewer tokens than the mean came to it in that
    step, over all ranks and micro-batches, and falls if more did. It decides who is chosen, not with which weight.
    Families of the DeepSeek kind have such biases, and go on from them. Those of the Qwen3 kind get them, on router
    logits, and the hub's format has no place for them (`lightning-ep export` says what to do).
    Logged as ``train/router_bias``, the largest magnitude.

    Args:
        rate: What a step adds or takes away.
    """

    def __init__(self, rate: float = 1e-3) -> None:
        self.rate = _positive(self, rate=rate)


class ForcedBalance(RouterRule):
    """For benchmarks and tests: every expert gets equally many tokens, whatever routers say; weights stay theirs."""


class SkewedRouting(RouterRule):
    """For benchmarks and tests: experts are drawn by Zipf's law, the same ones in every run; weights stay the routers'.

    Of a layer's experts, in an order of its own, the n-th is drawn in proportion to ``1 / n ** exponent``, ``K``
    different ones for each token.

    Args:
        exponent: 0 is uniform; 1 gives the first of 128 experts a sixth of all first choices.
        seed: Of the orders and draws.
    """

    def __init__(self, exponent: float = 1.0, seed: int = 0) -> None:
        if not exponent >= 0:
            raise ValueError(f"SkewedRouting(exponent={exponent}) must be 0 (uniform) or more.")
        self.exponent, self.seed = exponent, seed


class ModelsOwnLoss(RouterRule):
    """transformers' balancing loss, where ``output_router_logits`` asks for it, over the global micro-batch.

    Unlike `BalancingLoss` it takes shares and probabilities over all layers together.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient


def check_rules(rules: Any) -> tuple[RouterRule, ...]:
    """The rules as a tuple.

    Raises:
        TypeError: If there is something else among them.
        ValueError: If there are two of a kind, or two that both decide who is chosen.
    """
    found = () if rules is None else (rules,) if isinstance(rules, RouterRule) else tuple(rules)
    for rule in found:
        if not isinstance(rule, RouterRule):
            raise TypeError(
                f"router={rules!r}: {rule!r} is no rule for routers. Use lightning_ep.routing's BalancingLoss, "
                "RouterZLoss, BiasUpdates, ForcedBalance or SkewedRouting, or a list of them."
            )
    kinds = [type(rule) for rule in found]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"router={list(found)} has two of a kind: give one of each.")
    choosing = [rule for rule in found if isinstance(rule, ForcedBalance | SkewedRouting)]
    if len(choosing) > 1 or (choosing and BiasUpdates in kinds):
        raise ValueError(
            f"router={list(found)}: {choosing[0]!r} says who is chosen, so that nothing else can. Leave one."
        )
    return found


def _positive(rule: RouterRule, **values: float) -> float:
    ((name, value),) = values.items()
    if not value > 0:
        raise ValueError(
            f"{type(rule).__name__}({name}={value}) must be positive; leave the rule out to do without it."
        )
    return value
