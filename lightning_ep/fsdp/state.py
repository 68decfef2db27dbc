"""FSDP2's private state, as questions and orders in words: this file alone knows the private names.

A *state* belongs to a module to which `fully_shard` was applied, or to several that are one group; that of the module
that is called first becomes the *root* of those below it. A *group* holds the parameters that are gathered and reduced
together. The names are the same in torch 2.11 to 2.13; `docs/reference/workarounds.md` says what each is needed for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from lightning_ep.moe.master_weights import widen_gradient
from lightning_ep.ops.autograd import in_backward

State = Any  # torch.distributed.fsdp._fully_shard._fsdp_state.FSDPState
Group = Any  # torch.distributed.fsdp._fully_shard._fsdp_param_group.FSDPParamGroup
Parameter = Any  # torch.distributed.fsdp._fully_shard._fsdp_param.FSDPParam


def state_of(module: nn.Module) -> State:
    """The state of a module to which `fully_shard` was applied."""
    assert isinstance(module, FSDPModule)
    return module._get_fsdp_state()


def roots(module: nn.Module) -> Iterator[State]:
    """The roots in a module; none before their first forward."""
    for child in module.modules():
        if isinstance(child, FSDPModule) and (state := state_of(child))._is_root:
            yield state


def group_of(module: nn.Module) -> Group | None:
    """The group of a module to which `fully_shard` was applied; None if others hold all of its parameters."""
    return state_of(module)._fsdp_param_group


def states_in(module: nn.Module) -> set[State]:
    """The states of all modules in a module."""
    return {state_of(child) for child in module.modules() if isinstance(child, FSDPModule)}


def groups_of(root: State) -> Iterator[Group]:
    """The groups below a root, each once."""
    for state in root._state_ctx.all_states:
        if state._fsdp_param_group is not None:
            yield state._fsdp_param_group


def groups_in(module: nn.Module) -> list[Group]:
    """The groups in a module, each once, in one order on all ranks."""
    found = (group_of(child) for child in module.modules() if isinstance(child, FSDPModule))
    return list({id(group): group for group in found if group is not None}.values())


# ---------------------------------------------------------------------------------------------------- a pass


def make_root(state: State) -> None:
    """Makes a state the root of those below it, unless it is one or has one."""
    if state._is_root is None:
        state._lazy_init()


def is_outermost(state: State) -> bool:
    """Whether nothing is around a call of a root: no other root, and no checkpoint that repeats it in backward."""
    return state._is_root is not False and not in_backward()


def is_alone(state: State) -> bool:
    """Whether a call of a part came from outside of a pass: not from its root, nor from a checkpoint in backward."""
    return state._state_ctx.iter_forward_root in (None, state) and not in_backward()


def backward_is_unfinished(root: State) -> bool:
    """Whether a backward began and did not get to its end."""
    return bool(root._state_ctx.post_backward_final_callback_queued)


def finish_backward(root: State) -> None:
    """What comes at the end of a backward: reduces what groups have kept that it did not come to, and shards them."""
    type(root)._root_post_backward_final_callback(root)  # without what `before_backward_ends` adds


def make_idle(root: State) -> None:
    """Shards what is gathered below a root, drops what is being gathered, and forgets how far a pass had come."""
    for state in root._state_ctx.all_states:
        idle, group = type(state._training_state).IDLE, state._fsdp_param_group
        gathered = group is not None and group.is_unsharded
        if state._training_state == idle and not state._modules_to_run_forward and not gathered:
            continue
        state._training_state = idle
        state._modules_to_run_forward.clear()
        if group is not None:
            group._training_state = idle
            group.reshard()
    for group in groups_of(root):
        _drop_gathered_ahead(group)
    root._state_ctx.iter_forward_root = None


def _drop_gathered_ahead(group: Group) -> None:
    if group._all_gather_result is not None:
        group.finalize_backward()


def await_dropped_gathers(module: nn.Module) -> None:
    """Has the end of a backward wait for what was gathered ahead and never used, before it drops that.

    Its memory is the copy-in stream's, whose next gather else writes there while this one still arrives: shards are
    sent to other ranks with a piece of another's in them. torch asks a `torch.Stream` to wait for a `torch.cuda.Event`
    here, which does nothing.
    """
    for state in states_in(module):
        if (group := state._fsdp_param_group) is not None:
            wait = functools.partial(_await_gathered_ahead, group)
            group.finalize_backward = _around(group.finalize_backward, before=wait)


def _await_gathered_ahead(group: Group) -> None:
    if (ahead := group._all_gather_result) is not None:
        group._wait_all_gather_streams_on_event(ahead.all_gather_event)


def is_gathered(state: State) -> bool:
    """Whether the parameters of a state's group are gathered."""
    return bool(state._fsdp_param_group.is_unsharded)


# ---------------------------------------------------------------------------------------------------- without hooks


def leave_alone(state: State) -> None:
    """Takes a module's hooks away: it is gathered, reduced and sharded when it is said, whether it is called or not."""
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def gather(group: Group) -> None:
    """Gathers a group, or has what was gathered ahead in place."""
    group.unshard()
    group.wait_for_unshard()


def let_go(group: Group) -> None:
    """Shards a group, and drops what is being gathered; sends nothing to other ranks."""
    group.reshard()
    _drop_gathered_ahead(group)


def adopt(root: State, state: State) -> None:
    """Makes a state one of those below a root that is not known yet, though its module is none of the root's."""
    init = root._lazy_init

    @functools.wraps(init)
    def initialized() -> None:
        begun = root._is_root is not None
        init()
        if not begun:
            state._is_root = False
            root._state_ctx.all_states.append(state)
            root._init_shared_state()
            state._fsdp_param_group.lazy_init()

    root._lazy_init = initialized


def know_gradients(group: Group) -> None:
    """Has a group that was gathered ahead, and was never used yet, know what it computes with and its gradients."""
    if group._all_gather_result is not None and any(_unsharded(param) is None for param in group.fsdp_params):
        group.wait_for_unshard()


def gather_for_backward(state: State, grad: Tensor) -> None:
    """Gathers a group's parameters for the backward that comes to it with ``grad``."""
    state._pre_backward(grad)


# ---------------------------------------------------------------------------------------------------- ways in


def _around(
    call: Callable[..., Any], before: Callable[[], None] | None = None, after: Callable[[Any], None] | None = None
) -> Callable[..., Any]:
    """A call with something before it, and something after it that is given what it returns."""

    @functools.wraps(call)
    def called(*args: Any) -> Any:
        if before is not None:
            before()
        found = call(*args)
        if after is not None:
            after(found)
        return found

    return called


def before_every_forward(state: State, function: Callable[[], None]) -> None:
    """Calls ``function`` before forwards that a module's hooks do not see: methods that torch was told are forwards."""
    state._pre_forward = _around(state._pre_forward, before=function)


def after_entering(state: State, function: Callable[[], None]) -> None:
    """Calls ``function`` once such a forward has been entered, and its root gathered."""
    state._pre_forward = _around(state._pre_forward, after=lambda _: function())


def end_with_this_backward(root: State) -> None:
    """Has the end of the backward that runs be that of the root's, also if it does not come to the root."""
    root._register_root_post_backward_final_callback()


def after_every_forward(state: State, function: Callable[[Any], None]) -> None:
    """Calls ``function`` with the output behind such forwards."""
    state._post_forward = _around(state._post_forward, after=function)


def begin_backward_once(root: State, function: Callable[[], None]) -> None:
    """Has a root begin a backward at the first of its outputs only, and gather nothing ahead again at later ones.

    Args:
        root: The root.
        function: Is called at the first of its outputs.
    """
    begin = root._pre_backward

    @functools.wraps(begin)
    def begun(grad: Tensor) -> Tensor:
        if root._training_state == type(root._training_state).PRE_BACKWARD:
            return grad
        grad = begin(grad)
        function()
        return grad

    root._pre_backward = begun


def before_reduction(group: Group, function: Callable[[], None]) -> None:
    """Calls ``function`` when backward has come through a group, or ends, before its gradients are reduced or kept."""
    group.post_backward = _around(group.post_backward, before=function)


def after_backward_ends(state: State, function: Callable[[], None]) -> None:
    """Calls ``function`` when a backward that came to a module first has run, and all groups are reduced."""
    end = state._root_post_backward_final_callback
    state._root_post_backward_final_callback = _around(end, after=lambda _: function())


def before_backward_ends(state: State, function: Callable[[], None]) -> None:
    """Calls ``function`` when a backward that came to a module first has run, before the groups left are reduced."""
    end = state._root_post_backward_final_callback
    state._root_post_backward_final_callback = _around(end, before=function)


# ---------------------------------------------------------------------------------------------------- gradients


def keeps_gradients(group: Group) -> bool:
    """Whether a group keeps gradients of an accumulation window that have not been reduced."""
    return awaits_all_reduce(group) or any(_kept(param) is not None for param in group.fsdp_params)


def reduces(group: Group) -> bool:
    """Whether the end of this backward reduces a group's gradients, or an accumulation window keeps them."""
    return bool(group.reduce_grads)


def parameters(group: Group) -> list[Parameter]:
    """The parameters of a group."""
    return list(group.fsdp_params)


def trained(group: Group) -> list[Parameter]:
    """The parameters of a group that train."""
    return [param for param in group.fsdp_params if param.sharded_param.requires_grad]


def shard_of(param: Parameter) -> DTensor:
    """This rank's part of a parameter, which has its reduced gradient."""
    return param.sharded_param


def which_have_gradients(group: Group) -> list[bool]:
    """Of each parameter that trains, whether it has a gradient that was not reduced."""
    return [_kept(param) is not None for param in trained(group)]


def make_one_dtype(group: Group) -> None:
    """Gives all gradients of a group the dtype of the reduction, if some have it: FSDP2 refuses others beside them.

    What a window keeps is in that dtype; of a parameter that only its last backward comes to, the gradient is not.
    """
    params = trained(group)
    if any(param.unsharded_accumulated_grad is not None for param in params):
        for param in params:
            if param.unsharded_accumulated_grad is None and _unsharded(param) is not None:
                param.to_accumulated_grad_if_needed()


def add_gradients(group: Group, wanted: Iterable[bool]) -> None:
    """Gives parameters that are ``wanted`` and have no gradient one of zeros; all of a group's are of one dtype then.

    Args:
        group: A group that will reduce.
        wanted: As `which_have_gradients`, of any rank.
    """
    params = trained(group)
    make_one_dtype(group)
    dtype = next((grad.dtype for param in params if (grad := _kept(param)) is not None), None)
    for param, has_to in zip(params, wanted, strict=True):
        if has_to and _kept(param) is None:
            param.unsharded_accumulated_grad = torch.zeros_like(param._unsharded_param, dtype=dtype)


def awaits_all_reduce(group: Group) -> bool:
    """Whether a group keeps what its ranks have summed and copies of the model (``replicate``) have not."""
    return group._partial_reduce_output is not None


def add_zero_gradients(group: Group) -> None:
    """Gives parameters without a gradient one of zeros, with which the group reduces."""
    for param in group.fsdp_params:
        if param.sharded_param.requires_grad and param.unsharded_accumulated_grad is None:
            like = param._unsharded_param
            param.unsharded_accumulated_grad = torch.zeros_like(like, dtype=param.reduce_dtype or like.dtype)


def forget_gradients(root: State) -> None:
    """Drops what the groups below a root have kept and not reduced; ``zero_grad`` does not reach it."""
    for group in groups_of(root):
        group._partial_reduce_output = None
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if (unsharded := _unsharded(param)) is not None:
                unsharded.grad = None


def _kept(param: Any) -> Tensor | None:
    """The gradient of a parameter that was not reduced."""
    if (kept := param.unsharded_accumulated_grad) is not None:
        return kept
    return unsharded.grad if (unsharded := _unsharded(param)) is not None else None


def _unsharded(param: Any) -> Tensor | None:
    """What forward computes with, once it has been gathered for the first time."""
    return getattr(param, "_unsharded_param", None)


# ---------------------------------------------------------------------------------------------------- dtypes


def keep_fp32(state: State, kept: Collection[tuple[nn.Module, str]]) -> None:
    """Has a group gather some of its parameters in fp32, in the same collective as others in bf16.

    FSDP2 reduces the gradients of a group in one dtype and gives all shards another: here autograd makes them all fp32,
    and a shard in fp32 beside shards in bf16 gets its gradient by way of theirs.

    Args:
        state: A state whose parameters have not been gathered yet.
        kept: Modules and the names of their parameters, which are fp32.
    """
    params = state._fsdp_param_group.fsdp_params if state._fsdp_param_group is not None else []
    chosen = [param for param in params if (param._module_info.module, param._module_info.param_name) in kept]
    others = [param for param in params if param not in chosen]
    for param in chosen:
        param.init_dtype_attrs = functools.partial(_keep_dtype, param, others, param.init_dtype_attrs)
    for param in params if chosen and others else ():
        param.init_unsharded_param = functools.partial(_want_fp32_gradient, param, param.init_unsharded_param)


def _keep_dtype(
    param: Any, others: Iterable[Any], init: Callable[[MixedPrecisionPolicy], None], policy: MixedPrecisionPolicy
) -> None:
    init(replace(policy, param_dtype=None))
    shard = param.sharded_param
    trained = (other.sharded_param for other in others if other.sharded_param.requires_grad)
    narrow = [other.dtype for other in trained if other.dtype != shard.dtype]
    if narrow and shard.requires_grad and param.orig_dtype != narrow[0]:
        param.orig_dtype = narrow[0]
        if shard.grad_dtype is not None:
            shard.grad_dtype = None  # takes what comes, and widens it
            shard.register_post_accumulate_grad_hook(widen_gradient)


def _want_fp32_gradient(param: Any, init: Callable[[], None]) -> None:
    init()
    if param._unsharded_param.requires_grad:
        param._unsharded_param.grad_dtype = torch.float32
