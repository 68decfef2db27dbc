"""AdamW for sharded models: torch's update in one pass over the memory that a step is bound by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_ep.distributed.shards import in_memory_order_of, local_tensor
from lightning_ep.ops.adamw import Rule, Update, adamw_, adamw_rounded_
from lightning_ep.trainer.random_bits import Streams, in_rows

_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` (fused) with the same update and the same state dict, and less traffic.

    Half of a training step with few tokens per GPU is reading and writing weights, gradients and moments. On a GPU this
    optimizer reads and writes each once: the factor of `gradient_clip_val` is multiplied in as gradients are read, and
    the gradients of experts may come in the dtype of their GEMMs, without a pass that widens them. Both need
    `ExpertParallelStrategy`; elsewhere, and on CPUs, this is torch's optimizer.

    With ``stochastic_rounding`` both moments are kept in bf16: 4 bytes per parameter less beside fp32 weights, and a
    quarter of the traffic. bf16 weights can be trained without fp32 copies then: 8 bytes per parameter, with gradients
    and moments. Rounded to the nearest, an update below 1/512 of a weight changes nothing, and a second moment never
    decays at 0.999. Rounded up or down at random, the nearer the likelier, both are right in the mean (Gupta et al.,
    2015). The random bits are a function of seed, step, parameter and element, so that copies of a weight stay equal,
    and runs on other layouts, or resumed on them, take the same steps from the same gradients.

    Args:
        params: Parameters or parameter groups, DTensors or not.
        lr: Learning rate.
        betas: Decay of the two moments.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        stochastic_rounding: Keep the moments of matrices, and of all bf16 parameters, in bf16; round these moments and
            bf16 weights so. fp32 weights stay as they are, and so do the moments of fp32 vectors, which are nothing.
            With ``precision="bf16-true"`` `ExpertParallelStrategy` refuses to accumulate gradients with it.

    Raises:
        ValueError: If a parameter group or a loaded state is of AMSGrad or maximises, which this optimizer does not, or
            a loaded state is of other parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        stochastic_rounding: bool = False,
    ) -> None:
        # A list, so that Lightning's wrapper of this optimizer, which is an AdamW without attributes, shares it.
        self._factors: list[Tensor] = []
        self._rounding = Streams()
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        for group in self.param_groups:
            group.setdefault("stochastic_rounding", stochastic_rounding)
        self.defaults["stochastic_rounding"] = stochastic_rounding
        self._step_supports_amp_scaling = False  # torch's fused step divides by a GradScaler's scale, this one does not

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_factors"):  # a copy; a state that is loaded leaves gradients as they are
            self._factors = []
            self._rounding = Streams()
        for group in self.param_groups:
            _refuse_other_rules(group)
            # Where torch's AdamW wrote the state.
            group.setdefault("stochastic_rounding", self.defaults.get("stochastic_rounding", False))
            group["fused"] = True  # also if torch's other implementations wrote the state
            for param in group["params"]:
                if (step := self.state.get(param, {}).get("step")) is not None:
                    self.state[param]["step"] = step.to(param.device, torch.float32)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # torch gives moments the dtype of their parameters: fp32 ones of a whole model would be there for a moment.
        ids = [number for group in state_dict["param_groups"] for number in group["params"]]
        moments = {n: {key: entry[key] for key in _MOMENTS if key in entry} for n, entry in state_dict["state"].items()}
        others = {n: {k: v for k, v in entry.items() if k not in _MOMENTS} for n, entry in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": others})
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        for number, (group, param) in zip(ids, pairs, strict=True):
            for key, moment in moments.get(number, {}).items():
                if moment.shape != param.shape:  # a kernel would write past its end
                    raise ValueError(
                        f"the state to be loaded has {key} of shape {tuple(moment.shape)} for parameter {number} of "
                        f"shape {tuple(param.shape)}: it is of other parameters, or of these in another order."
                    )
                self.state[param][key] = moment.to(param.device, _moment_dtype(param, group))

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _refuse_other_rules(param_group)
        super().add_param_group(param_group)

    @property
    def rounds(self) -> bool:
        """Whether any group of parameters is rounded stochastically."""
        return any(group["stochastic_rounding"] for group in self.param_groups)

    def name_parameters(self, names: Mapping[str, Tensor], seed: int) -> None:
        """Says what random bits of rounding are keyed by, for parameters that have no state yet.

        `ExpertParallelStrategy` calls it. Without it the seed is 0, and the names are those that the groups have
        (``AdamW(model.named_parameters())``), else the parameters' positions.

        Args:
            names: Parameters by name, which must be the same on every rank and layout; also some that join later.
            seed: The same on every rank.
        """
        self._rounding.name(names, seed)

    def multiply_gradients(self, factor: Tensor) -> None:
        """Multiplies the gradients of the next step, as it reads them.

        Args:
            factor: 0-dim, on the gradients' device.
        """
        self._factors.append(factor)

    def forget_factors(self) -> None:
        """Takes back what `multiply_gradients` was given, for a step that is left out."""
        self._factors.clear()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        self.forget_factors()
        super().zero_grad(set_to_none)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Lightning clips in the closure. Not `torch.prod`, which compiles a kernel: six seconds of a first step.
        factor = reduce(torch.mul, self._factors) if self._factors else None
        self._factors.clear()
        for group in self.param_groups:
            self._begin_narrow_moments(group)
            params: list[Tensor] = []
            grads: list[Tensor] = []
            exp_avgs: list[Tensor] = []
            exp_avg_sqs: list[Tensor] = []
            steps: list[Tensor] = []
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], steps)
            if not params:
                continue
            torch._foreach_add_(steps, 1)
            mine = [local_tensor(param) for param in params]
            # Gradients that users have set themselves may lie in memory in any order.
            of_mine = [in_memory_order_of(local_tensor(g), p) for g, p in zip(grads, mine, strict=True)]
            local = (mine, of_mine, *([local_tensor(t) for t in ts] for ts in (exp_avgs, exp_avg_sqs, steps)))
            rule = Rule(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
            updates = dict(zip(params, (Update(*tensors) for tensors in zip(*local, strict=True)), strict=True))
            if group["stochastic_rounding"]:
                for param in [param for param in params if self.state[param]["exp_avg"].dtype == torch.bfloat16]:
                    self._step_rounded(param, updates.pop(param), rule, factor)
            adamw_(list(updates.values()), rule, factor)
            torch.autograd.graph.increment_version(params)
        return loss

    def _begin_narrow_moments(self, group: dict[str, Any]) -> None:
        """Where torch would begin with moments in the dtype of the parameter."""
        for param in group["params"]:
            if param.grad is not None and not self.state[param] and _moment_dtype(param, group) != param.dtype:
                step = torch.zeros((), dtype=torch.float32, device=param.device)
                zeros = (torch.zeros_like(param, dtype=_moment_dtype(param, group)) for _ in _MOMENTS)
                self.state[param].update(step=step, **dict(zip(_MOMENTS, zeros, strict=True)))

    def _step_rounded(self, param: Tensor, update: Update, rule: Rule, factor: Tensor | None) -> None:
        # Kept with the state: a run that is resumed has the bits of the one that began, whatever its seed.
        key = self.state[param].get("rounding_key")
        if key is None:
            key = self.state[param]["rounding_key"] = self._rounding.key(param, self.param_groups)
        for piece, elements in in_rows(update, self._rounding.region(param), tuple(param.shape), key):
            adamw_rounded_(piece, rule, factor, elements)


def _moment_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    narrow = group["stochastic_rounding"] and param.dtype == torch.float32 and param.ndim > 1
    return torch.bfloat16 if narrow else param.dtype


def _refuse_other_rules(group: dict[str, Any]) -> None:
    for flag in ("amsgrad", "maximize"):
        if group.get(flag):
            raise ValueError(f"lightning_ep.AdamW has no {flag}, as a group of parameters says; use torch.optim.AdamW.")
