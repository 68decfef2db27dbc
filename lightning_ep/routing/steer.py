"""Steers the routers of a model while it trains: what each pass adds up, each backward gets, and each step changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.routing.biases import bias_of, give_biases, update_biases
from lightning_ep.routing.choices import choice_of
from lightning_ep.routing.losses import balance_of_all_layers, balance_per_layer, sums_of_layer
from lightning_ep.routing.observe import Logits, Observation, Routing, choose, moe_layers
from lightning_ep.routing.router_rules import (
    BalancingLoss,
    BiasUpdates,
    ModelsOwnLoss,
    RouterRule,
    RouterZLoss,
    check_rules,
)
from lightning_ep.routing.tally import sum_over_ranks

_LOSSES = (BalancingLoss, RouterZLoss, ModelsOwnLoss)
_NAMES = {BalancingLoss: "router_balance", RouterZLoss: "router_z", ModelsOwnLoss: "router_aux"}


def steer_routers(module: nn.Module, rules: RouterRule | Iterable[RouterRule] | None = None) -> None:
    """Steers the routers of the transformers MoEs in ``module`` by rules, in place of those of an earlier call.

    A LightningModule needs no call: it has the rules as an attribute ``router_rules``. Losses are then added where the
    loss of ``training_step`` enters backward, with the weight of its mean, and logged; without a Trainer add
    `router_losses` to yours. Where a model's config asks for transformers' own balancing loss
    (``output_router_logits``), this is taken over the global micro-batch, and left out of what the model returns.

    Args:
        module: A model, or a module around some, not sharded yet.
        rules: The rules.

    Raises:
        TypeError: If something is no rule.
        ValueError: If rules contradict each other, or a family has no place for one.
    """
    found = check_rules(rules)
    models = {name: model for name, model in adapter.pretrained_models(module).items() if moe_layers(model)}
    if not models:
        raise ValueError(
            f"{type(module).__name__} has no experts, so that there is nothing to steer for {list(found)}."
        )
    # Not a frozen teacher beside others: its biases would move, and its values be logged.
    trained = {name: m for name, m in models.items() if any(param.requires_grad for param in m.parameters())}
    for name, model in (trained or models).items():
        own = adapter.own_balancing_loss(model)
        steering = Steering(model, found if own is None else (*found, ModelsOwnLoss(own)), name)
        if (before := adapter.recall(model, Steering)) is not None:
            before.end()
        elif own is not None:
            adapter.leave_out_balancing_loss(model)
        adapter.remember(model, steering)


def freeze_routers(module: nn.Module) -> None:
    """Leaves the weights of all routers in ``module`` as they are: no optimizer trains them; before it is sharded.

    Raises:
        ValueError: If adapters train a router.
    """
    for model in adapter.pretrained_models(module).values():
        routers = {layer.name: layer.router for layer in moe_layers(model) if layer.router is not None}
        for name, router in routers.items() if adapter.peft_configs(model) else ():
            if trained := [key for key, param in router.named_parameters() if param.requires_grad]:
                raise ValueError(
                    f"freeze_router=True, and the adapter trains {trained} of the router of {name}. A router is either "
                    "frozen or trained: leave out freeze_router, or take the router out of the adapter "
                    "(modules_to_save, target_modules); beneath an adapter it is frozen anyway."
                )
        for router in routers.values():
            router.requires_grad_(False)


@dataclass(frozen=True)
class _Added:
    """What the forwards of a micro-batch add up, by layer.

    Attributes:
        counts_LE: int64, choices of experts.
        sums: As `sums_of_layer` gives them.
    """

    counts_LE: Tensor
    sums: dict[int, Tensor] = field(default_factory=dict)

    def add(self, routing: Routing, scoring: adapter.Scoring | None) -> None:
        """Adds a layer's choices, and with a ``scoring`` what its losses need."""
        index = routing.layer.index
        routing.count_into(self.counts_LE[index])
        if scoring is not None:
            assert routing.logits_TE is not None
            sums_S = sums_of_layer(routing.logits_TE, routing.counted_T, scoring)
            self.sums[index] = sums_S + self.sums[index] if index in self.sums else sums_S

    def copy(self) -> _Added:
        """As it is now."""
        return _Added(self.counts_LE.clone(), dict(self.sums))

    def rows(self) -> Tensor:
        """The sums of all layers, ``[L, E + 1]`` in fp64; zeros where a layer has fewer experts, or no tokens."""
        num_layers, width = self.counts_LE.shape
        none_S = torch.zeros(width + 1, device=self.counts_LE.device)
        rows = [_widened(self.sums[index], width) if index in self.sums else none_S for index in range(num_layers)]
        return torch.stack(rows).double()


class Steering:
    """What is remembered of a model whose routers are steered.

    Attributes:
        name: Of the model in what it was found in.

    Args:
        model: The model, sharded or not yet.
        rules: As `check_rules` gives them.
        name: See the attribute.
    """

    def __init__(self, model: PreTrainedModel, rules: tuple[RouterRule, ...], name: str = "") -> None:
        self.name = name
        self._layers = layers = moe_layers(model)
        self._losses = [rule for rule in rules if isinstance(rule, _LOSSES)]
        self._biases = next((rule for rule in rules if isinstance(rule, BiasUpdates)), None)
        self._choice = next((choice for rule in rules if (choice := choice_of(rule)) is not None), None)
        self._scoring = {}
        for layer in layers if self._losses else ():
            scoring = None if layer.router is None else adapter.router_scoring(layer.router)
            if scoring is None or (scoring == "probabilities" and any(isinstance(r, RouterZLoss) for r in rules)):
                kind = "none was found" if layer.router is None else type(adapter.inside_wrapper(layer.router)).__name__
                raise ValueError(
                    f"{self._losses} cannot be had in {layer.name}: it is not known how its router ({kind}) makes "
                    f"scores of logits. Use {'no rule' if adapter.peft_configs(model) else 'BiasUpdates, or no rule'}."
                )
            self._scoring[layer.index] = scoring
        if self._biases is not None:
            if adapter.peft_configs(model):
                raise ValueError(
                    f"{self._biases!r} changes the model beneath its adapters, which are saved without it. Use "
                    "BalancingLoss, which trains the adapters to balance the experts, or train the whole model."
                )
            give_biases(layers)
        self._model = model
        self._top_k = [1] * len(layers)
        self._sizes_2L: Tensor | None = None
        self._num_experts = [layer.num_experts for layer in layers]
        self._observation: Observation | None = None
        self._added: tuple[_Added, ...] | None = None  # by who is chosen; and apart from that by transformers' loss
        self._window_LE: Tensor | None = None  # counts since the last step
        self._values: Tensor | None = None  # of the losses, each micro-batch with its weight, and the weights
        rank_zero_info(f"Routers of {type(model).__name__}: {', '.join(map(repr, rules)) or 'no rules'}.")

    @property
    def has_losses(self) -> bool:
        """Whether there is anything to be added to a loss."""
        return bool(self._losses)

    def begin(self) -> None:
        """Begins to look at the routers of the model, which is sharded by now."""
        if self._observation is None and (self._losses or self._biases is not None):
            logits: Logits | None = "graph" if self._losses else None
            self._observation = Observation(self._model, self._see, logits, mark=self._mark)
        if self._biases is not None:
            for layer in self._layers:
                bias_of(layer)
        if self._choice is not None:
            choose(self._model, self._choice)

    def end(self) -> None:
        """Leaves the routers alone."""
        if self._observation is not None:
            self._observation.remove()
        if self._choice is not None:
            choose(self._model, None)

    def _see(self, routing: Routing) -> None:
        if not routing.training:
            return
        index, ids_TK = routing.layer.index, routing.ids_TK
        if self._added is None:
            self._added = self._nothing(ids_TK.device)
        if self._top_k[index] != ids_TK.shape[1]:
            self._top_k[index], self._sizes_2L = ids_TK.shape[1], None
        needs_logits = bool(self._losses) and len(ids_TK) > 0  # experts may be entered without tokens and their router
        if needs_logits and routing.logits_TE is None:
            router = self._layers[index].router
            raise RuntimeError(
                f"{self._losses} need the logits of {routing.layer.name}, and its router ({type(router).__name__}) was "
                "not called before its experts: something stands in its place, or calls its forward past the module. "
                "Have the model call the router as a module, or leave the rules out."
            )
        self._added[0].add(routing, self._scoring[index] if needs_logits else None)
        if len(self._added) > 1 and routing.logits_TE is not None:
            largest_TK = routing.logits_TE.detach().topk(ids_TK.shape[1]).indices
            self._added[1].add(replace(routing, ids_TK=largest_TK), "softmax" if needs_logits else None)

    def _nothing(self, device: torch.device) -> tuple[_Added, ...]:
        shape = len(self._num_experts), max(self._num_experts)
        parts = 2 if self._own_is_apart else 1
        return tuple(_Added(torch.zeros(shape, dtype=torch.int64, device=device)) for _ in range(parts))

    @cached_property
    def _own_is_apart(self) -> bool:
        """Whether transformers' loss, of the K largest of a softmax, has other choices or scores than the routers."""
        if not any(isinstance(rule, ModelsOwnLoss) for rule in self._losses):
            return False
        biased = [adapter.correction_bias(layer.router, layer.block) is not None for layer in self._layers]
        return any(biased) or any(scoring != "softmax" for scoring in self._scoring.values())

    def _mark(self) -> Callable[[], None]:
        before = None if self._added is None else tuple(added.copy() for added in self._added)

        def forget() -> None:
            self._added = before

        return forget

    def losses(self, weight: Tensor | float, device: torch.device, mean: bool) -> Tensor | None:
        """This rank's part of the losses of the forwards since the last call; every rank must call it.

        Args:
            weight: Of the micro-batch, in what is logged; where it is no mean, this rank's terms of a sum.
            device: Where tensors are.
            mean: Whether the loss beside it is a mean, of which every micro-batch counts as much.

        Returns:
            0-dim: the sum over ranks is that of losses times coefficients, times the terms of all ranks unless
            ``mean``. None without losses.
        """
        added, self._added = self._added, None
        if self._biases is not None and added is not None:
            counts_LE = added[0].counts_LE
            self._window_LE = counts_LE if self._window_LE is None else self._window_LE + counts_LE
        if not self._losses:
            return None
        added = self._nothing(device) if added is None else added
        mine_ALS = torch.stack([one.rows() for one in added])
        counts_ALE = torch.stack([one.counts_LE for one in added]).double()
        terms = torch.as_tensor(weight, dtype=torch.float64, device=device)
        packed = torch.cat([counts_ALE.flatten(), mine_ALS.detach().flatten(), terms[None]])
        counts, sums_of_all, terms_of_all = sum_over_ranks(packed).split([counts_ALE.numel(), mine_ALS.numel(), 1])
        weight_of_all = torch.ones_like(terms) if mean else terms_of_all[0]
        values = self._evaluate(counts.view_as(counts_ALE), sums_of_all.view_as(mine_ALS))
        noted = torch.cat([values * weight_of_all, weight_of_all[None]])
        self._values = noted if self._values is None else self._values + noted
        parts = self._evaluate(counts.view_as(counts_ALE), mine_ALS)
        coefficients = [rule.coefficient for rule in self._losses]
        total = torch.stack([c * part for c, part in zip(coefficients, parts.unbind(), strict=True)]).sum()
        return total * weight_of_all

    def _evaluate(self, counts_ALE: Tensor, sums_ALS: Tensor) -> Tensor:
        """The losses, by rule, from counts of all ranks and sums of all or one; the last are transformers' own."""
        if self._sizes_2L is None:
            self._sizes_2L = torch.tensor([self._top_k, self._num_experts], device=counts_ALE.device)
        top_k_L, experts_L = self._sizes_2L
        counts_LE, sums_LE, squares_L = counts_ALE[0], sums_ALS[0, :, :-1], sums_ALS[0, :, -1]
        tokens_L = (counts_LE.sum(1) / top_k_L).clamp(min=1)
        found = []
        for rule in self._losses:
            if isinstance(rule, BalancingLoss):
                found.append(balance_per_layer(counts_LE, sums_LE, tokens_L, experts_L).mean())
            elif isinstance(rule, RouterZLoss):
                found.append((squares_L / tokens_L).mean())
            else:
                own_LE = sums_ALS[-1, :, :-1]
                found.append(balance_of_all_layers(counts_ALE[-1], own_LE, tokens_L, max(self._num_experts)))
        return torch.stack(found)

    def step(self, device: torch.device, skipped: bool = False) -> dict[str, Tensor]:
        """Ends an optimizer step: updates biases unless it is left out, returns what is logged; all ranks call it."""
        logged: dict[str, Tensor] = {}
        noted, self._values = self._values, None
        if noted is not None:
            means = (noted[:-1] / noted[-1].clamp(min=1e-300)).float()
            logged = {_NAMES[type(rule)]: mean for rule, mean in zip(self._losses, means, strict=True)}
        if self._biases is not None:
            window_LE, self._window_LE = self._window_LE, None
            if window_LE is None or skipped:
                window_LE = torch.zeros(len(self._layers), max(self._num_experts), dtype=torch.int64, device=device)
            logged["router_bias"] = update_biases(self._layers, sum_over_ranks(window_LE), self._biases.rate)
        return logged


def _widened(sums_S: Tensor, width: int) -> Tensor:
    """``[E + 1]`` of a layer as ``[width + 1]``, with zeros for the experts that it has less than others."""
    return torch.cat([sums_S[:-1], sums_S.new_zeros(width + 1 - len(sums_S)), sums_S[-1:]])


def steerings(module: nn.Module) -> list[Steering]:
    """Those of the models inside ``module``."""
    found: list[Any] = [adapter.recall(model, Steering) for model in adapter.pretrained_models(module).values()]
    return [steering for steering in found if steering is not None]


def router_losses(module: nn.Module, device: torch.device) -> Tensor:
    """For loops without a Trainer: this rank's part of the losses of the forwards since the last call, 0-dim.

    Gradients are sums over ranks: add it to the loss behind the division by these. Call `step_routers` once per
    optimizer step. Every rank must call both.
    """
    total = torch.zeros((), device=device)
    for steering in steerings(module):
        if (part := steering.losses(1.0, device, mean=True)) is not None:
            total = total + part
    return total


def step_routers(module: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Ends an optimizer step of routers, once per step on every rank: updates biases, returns values to be logged."""
    return step_all(steerings(module), device)


def step_all(steerings: Sequence[Steering], device: torch.device, skipped: bool = False) -> dict[str, Tensor]:
    """As `step_routers`; where several models are steered, names end with theirs, as ``router_z/student``.

    Biases stay as they are in a step that is ``skipped``.
    """
    several = len(steerings) > 1
    return {
        f"{key}/{steering.name}" if several else key: value
        for steering in steerings
        for key, value in steering.step(device, skipped).items()
    }
