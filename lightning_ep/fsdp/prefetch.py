"""What FSDP gathers ahead of its use: the chain of prefetches through a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_ep.moe.experts import is_parallel_experts


def chain_prefetches(
    model: nn.Module,
    embedding: nn.Module | None,
    layers: Iterable[Sequence[nn.Module]],
    parts: Sequence[nn.Module] = (),
) -> None:
    """Has every group of parameters gather those of one step further on before it computes, in both directions.

    Left alone, FSDP gathers a group when the host gets to it. The host waits for the GPU in every MoE layer (for the
    sizes of its exchange), so a gather would start late, with nothing to hide it. It costs the gathered parameters of
    one more layer, or of the layers that are gathered together.

    Args:
        model: The root. An output head that is a group of its own is gathered when it is called: gathered ahead, in a
            forward that does not come to it, it would wait with its old weights.
        embedding: The input embedding, if it is known.
        layers: The decoder layers in the order of forward, those together that FSDP gathers together; a layer that is
            alone may have groups inside, for its experts.
        parts: What is gathered in every forward, called or not: behind what computes first, which it would hold up.
    """
    # Experts come after their layer's own parameters in forward, and in backward too: a layer's hook fires with the
    # gradient of its output.
    groups = [[group[0], *_inner_groups(group[0], parts)] for group in layers]
    inputs = [] if embedding is None else [embedding]
    if parts:
        first = [*inputs, *(groups[0] if groups else [])]
        assert isinstance(model, FSDPModule)
        model.set_modules_to_forward_prefetch([unit for unit in (*first, *parts) if isinstance(unit, FSDPModule)])
    _chain([inputs, *groups], FSDPModule.set_modules_to_forward_prefetch)
    _chain([[model], *groups[::-1]], FSDPModule.set_modules_to_backward_prefetch)


def _inner_groups(layer: nn.Module, parts: Sequence[nn.Module]) -> list[nn.Module]:
    inner = [m for m in layer.modules() if isinstance(m, FSDPModule) and m is not layer and m not in parts]
    return [m for m in inner if is_parallel_experts(m)]  # not what experts share, which they fetch themselves


def _chain(groups: list[list[nn.Module]], prefetch: Callable[[FSDPModule, list[FSDPModule]], None]) -> None:
    units = [(unit, len(group)) for group in groups for unit in group if isinstance(unit, FSDPModule)]
    for index, (unit, _) in enumerate(units[:-1]):
        ahead = units[index + 1][1]  # a whole layer: of this one what is left, of the next one what has come
        prefetch(unit, [following for following, _ in units[index + 1 : index + 1 + ahead]])
