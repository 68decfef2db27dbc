"""Which parameters are gathered ahead of their use."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_ep import ParallelLayout, parallelize
from lightning_ep.fsdp import groups as layer_groups
from lightning_ep.loss import summed_loss
from lightning_ep.ops.cross_entropy import shifted
from tests.ranks import device, run_ranks
from tests.reference import batches, tiny_model


class _Holder(nn.Module):
    def __init__(self, model: nn.Module, calls_its_head: bool) -> None:
        super().__init__()
        self.model, self.calls_its_head = model, calls_its_head


def _events(ep: int, layers_together: int, head_alone: bool = False) -> list[list[str]]:
    """Groups in the order in which they are gathered, and (with a star) layers in which computation starts.

    Of two steps, each forward then backward.
    """
    model = tiny_model(num_hidden_layers=4)
    layer = model.model.layers[0]
    dense = sum(param.numel() for name, param in layer.named_parameters() if "experts" not in name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_groups, "_GROUPED_PARAMETERS", layers_together * dense)
        holder = _Holder(model, head_alone)
        parallelize(holder, ParallelLayout.resolve(ep, "auto", 4, 4), device())
    events: list[str] = []
    seen = set()
    for name, module in model.named_modules():
        name = name.removeprefix("model.") or "root"
        if isinstance(module, FSDPModule) and module._get_fsdp_state() not in seen:
            seen.add(module._get_fsdp_state())
            group: Any = module._get_fsdp_state()._fsdp_param_group

            def unshard(*args: Any, _name: str = name, _group: Any = group, **kwargs: Any) -> None:
                gathered = _group.is_unsharded or _group._all_gather_result is not None
                type(_group).unshard(_group, *args, **kwargs)
                if not gathered and _group._all_gather_result is not None:
                    events.append(_name)

            group.unshard = unshard
        if name.endswith("post_attention_layernorm"):
            star = "*" + name.removesuffix(".post_attention_layernorm")
            module.register_forward_pre_hook(lambda *_, star=star: events.append(star))
            module.register_full_backward_pre_hook(lambda *_, star=star: events.append(star))
    batch = batches(1, 2)[0]
    targets, inputs = shifted(batch["labels"]).to(device()), {"input_ids": batch["input_ids"].to(device())}

    def take() -> list[str]:
        taken, events[:] = events.copy(), []
        return taken

    phases = []
    for _ in range(2):
        loss, _ = summed_loss(model, targets, inputs)
        phases.append(take())
        loss.backward()
        phases.append(take())
    return phases


def _expect(phases: list[list[str]], forward: list[str], backward: list[str]) -> None:
    assert phases == [forward, backward] * 2


def test_a_layer_is_gathered_while_the_one_before_computes() -> None:
    forward = "root embed_tokens layers.0 layers.1 *layers.0 layers.2 *layers.1 layers.3 *layers.2 *layers.3"
    backward = "root layers.3 layers.2 *layers.3 layers.1 *layers.2 layers.0 *layers.1 *layers.0"
    for phases in run_ranks(4, _events, 4, 1):
        _expect(phases, forward.split(), backward.split())


def test_a_head_by_itself_is_gathered_once() -> None:
    forward = "root embed_tokens layers.0 layers.2 *layers.0 *layers.1 *layers.2 *layers.3 lm_head"
    backward = "root layers.2 layers.0 *layers.3 *layers.2 *layers.1 *layers.0"
    for phases in run_ranks(4, _events, 4, 2, True):
        _expect(phases, forward.split(), backward.split())


def test_small_layers_are_gathered_together() -> None:
    forward = "root embed_tokens layers.0 layers.2 *layers.0 *layers.1 *layers.2 *layers.3"
    backward = "root layers.2 layers.0 *layers.3 *layers.2 *layers.1 *layers.0"
    for phases in run_ranks(4, _events, 4, 2):
        _expect(phases, forward.split(), backward.split())


@pytest.mark.parametrize("layers_together", [1, 3])
def test_experts_that_are_sharded_are_gathered_a_layer_ahead_too(layers_together: int) -> None:
    """Their layers stay alone."""
    forward = (
        "root embed_tokens layers.0 layers.0.mlp.experts layers.1 *layers.0 layers.1.mlp.experts layers.2 *layers.1 "
        "layers.2.mlp.experts layers.3 *layers.2 layers.3.mlp.experts *layers.3"
    )
    backward = (
        "root layers.3 layers.3.mlp.experts layers.2 layers.2.mlp.experts *layers.3 layers.1 layers.1.mlp.experts "
        "*layers.2 layers.0 layers.0.mlp.experts *layers.1 *layers.0"
    )
    for phases in run_ranks(4, _events, 2, layers_together):
        _expect(phases, forward.split(), backward.split())
