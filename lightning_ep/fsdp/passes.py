"""Passes of FSDP2: where they begin, where they end, and what becomes of those that break off.

A *pass* is one forward of a root and the backward that follows. FSDP2 keeps how far a pass has come in marks on its
states and in what is gathered, takes the first module that is called for the root, expects all layers of a group to
run, and never asks whether the pass before got to its end. Where that is not so, weights from before an optimizer step
are used and gradients are lost, without a word. So this file says of every call what it is to a pass:

==================================================  ===================================================================
a call                                              is
==================================================  ===================================================================
of the root, or of a method that is a forward, too  the **beginning** of a pass: what the one before has left ends first
of an embedding or a layer before any forward       a call of a part, which must not become the root: the root is first
of a layer of a group inside a forward              a part, whose inputs are cast, and from which a backward may start
of a layer by itself (a probe)                      a pass of its own, which **ends** with the call
that raises, or whose backward does                 **broken off**: the pass ends at once, everything is a shard again
of experts again in backward, by a checkpoint of    a forward that nobody ends: it ends with this backward, as
the user's                                          `lightning_ep.moe.experts` asks FSDP by its public method
==================================================  ===================================================================

Gradients follow the rule of plain modules: what earlier backward passes of an accumulation window have added stays if a
forward raises; if a backward does, set them to zero and begin the window again.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.utils import _apply_to_tensors

from lightning_ep.fsdp import state as fsdp
from lightning_ep.fsdp.state import Group, State


def begin_pass(state: State) -> None:
    """Ends what the pass before has left, if this call begins one."""
    if fsdp.is_outermost(state):
        end_pass(state)


def end_pass(root: State) -> None:
    """Leaves nothing gathered, or marked as under way, below a root; sends nothing to other ranks."""
    if fsdp.backward_is_unfinished(root):
        fsdp.forget_gradients(root)  # of groups that have not come to their reduction, which other ranks may have
        fsdp.finish_backward(root)
    fsdp.make_idle(root)


@contextmanager
def break_off_if_it_raises(module: nn.Module) -> Generator[None, None, None]:
    """Ends the pass inside if it raises; until then the parameters of ``module`` are gathered copies."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # what fails now (a broken GPU) would hide the error; the next pass begins with it
            for root in filter(fsdp.is_outermost, fsdp.roots(module)):
                end_pass(root)
        raise


# ---------------------------------------------------------------------------------------------------- who is watched


def watch_root(root: nn.Module, parts: Iterable[nn.Module] = ()) -> None:
    """Has every forward of a root begin a pass, and break it off if it raises.

    Args:
        root: A module to which `fully_shard` was applied last.
        parts: Modules of it that user code may call before its first forward.
    """
    state = fsdp.state_of(root)
    fsdp.await_dropped_gathers(root)
    for group in fsdp.groups_in(root):
        fsdp.before_reduction(group, partial(_make_one_dtype, group))
    root.register_forward_pre_hook(lambda *_: begin_pass(state), prepend=True)
    root.register_forward_pre_hook(_MadeOutsideOfInference(), prepend=True)
    fsdp.before_every_forward(state, partial(begin_pass, state))
    root.register_forward_hook(partial(_leave_root, state))
    root.forward = break_off_if_it_raises(root)(root.forward)  # the context, anew around every call

    def know_root(*_: Any) -> None:
        fsdp.make_root(state)
        for handle in handles:  # hooks cost the host time, and these have done what they are for
            handle.remove()

    handles = [part.register_forward_pre_hook(know_root, prepend=True) for part in parts]


def _make_one_dtype(group: Group) -> None:
    if fsdp.reduces(group):
        fsdp.make_one_dtype(group)


class _MadeOutsideOfInference:
    """Has FSDP make its buffers before a first forward in inference mode; with tensors of that mode nothing trains."""

    def __init__(self) -> None:
        self._made = False

    def __call__(self, root: nn.Module, *_: Any) -> None:
        if self._made or not torch.is_inference_mode_enabled():
            return
        self._made = True
        fsdp.make_root(fsdp.state_of(root))
        with torch.inference_mode(False), torch.no_grad():
            for child in root.modules():
                if isinstance(child, FSDPModule):
                    child.unshard()
                    child.reshard()


def watch_layers(group: list[nn.Module], mp_policy: MixedPrecisionPolicy) -> None:
    """Has layers that are one group do what single ones do, where a pass comes to some of them only.

    A loss on hidden states in the middle (of an exit, a probe) starts backward there, with weights that are not
    gathered. torch 2.11 also casts the inputs of the first layer only.

    Args:
        group: Modules to which `fully_shard` was applied together.
        mp_policy: The policy that it was given.
    """
    state = fsdp.state_of(group[0])
    for layer in group[1:]:
        layer.register_forward_pre_hook(partial(_enter_layer, state, mp_policy), with_kwargs=True)
    for layer in group:
        layer.register_forward_hook(partial(_leave_layer, state))


def _enter_layer(state: State, mp_policy: MixedPrecisionPolicy, layer: nn.Module, args: Any, kwargs: Any) -> Any:
    if not fsdp.is_gathered(state):
        raise RuntimeError(
            "The weights of a decoder layer are not gathered, because the layers that FSDP gathers with it have been "
            "through backward already: a reentrant checkpoint around single layers does that. Use "
            "activation_checkpointing='selective' or 'full' instead, or use_reentrant=False."
        )
    return cast_inputs(mp_policy, args, kwargs)


def cast_inputs(mp_policy: MixedPrecisionPolicy, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """The arguments of a forward as FSDP casts them, or None where there is nothing to cast."""
    dtype = mp_policy.param_dtype
    if dtype is None or not mp_policy.cast_forward_inputs or not any(map(partial(_may_cast, dtype), (args, kwargs))):
        return None

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return _apply_to_tensors(cast, args), _apply_to_tensors(cast, kwargs)


def _may_cast(dtype: torch.dtype, value: Any) -> bool:
    """Whether there may be a floating tensor of another dtype in ``value``: mostly not, and rebuilding takes long."""
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dtype != dtype
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple):
        return not isinstance(value, bool | int | str | None)
    return any(_may_cast(dtype, item) for item in value)


def _leave_layer(state: State, layer: nn.Module, args: Any, output: Any) -> None:
    def gather(grad: Tensor) -> None:
        if not fsdp.is_gathered(state):
            fsdp.gather_for_backward(state, grad)

    for tensor in tensors_in(output):
        if tensor.requires_grad:
            tensor.register_hook(gather)
    if fsdp.is_alone(state):
        end_pass(state)


def _leave_root(state: State, root: nn.Module, args: Any, output: Any) -> None:
    """Has backward begin at what a root returns in an object, where FSDP2 finds no tensor."""
    for tensor in _in_objects(output):
        if tensor.requires_grad:
            tensor.register_hook(partial(fsdp.gather_for_backward, state))


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors that a module returned, in containers and in objects of a user's own (dataclasses, namespaces)."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)
    else:
        yield from _in_objects(output)


def _in_objects(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _in_objects(value)
    elif is_dataclass(output):
        for field in fields(output):
            yield from tensors_in(getattr(output, field.name))
    elif not isinstance(output, Tensor):  # of others the attributes alone: a cache holds tensors deeper inside
        yield from (value for value in getattr(output, "__dict__", {}).values() if isinstance(value, Tensor))
