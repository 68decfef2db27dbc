"""Passes that raised: FSDP takes the next forward for a part of them, and would use their weights and gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from lightning_ep.fsdp.accumulation import forget_gradients_of, groups_of, roots


def recover_from_interruptions(root: nn.Module) -> None:
    """Has every forward of a root of FSDP start afresh, whatever became of the pass before.

    Forward gathers weights, and marks how far it has come, until it gets to its end, or backward to its own. One that
    raises (out of memory, an interrupted notebook), or ends in the middle, leaves weights gathered, which the next
    forward would use as they were, before any optimizer step since; after a backward that raised nothing is gathered
    or reduced on time any more. All of that is silent (torch 2.11 to 2.13).

    Gradients follow the rule of plain modules: what earlier backward passes of an accumulation window have added stays
    if a forward raises; if a backward does, set them to zero and begin the window again.

    Args:
        root: A module to which `fully_shard` was applied last.
    """
    assert isinstance(root, FSDPModule)
    state: Any = root._get_fsdp_state()
    # The two ways into a forward: the module's own, and methods that `register_fsdp_forward_method` made one.
    root.register_forward_pre_hook(lambda *_: _end_earlier_pass(state), prepend=True)
    state._pre_forward = functools.partial(_begin_pass, state, state._pre_forward)
    root.forward = _released_if_it_raises(root, root.forward)


def release_gathered(module: nn.Module) -> None:
    """Shards what a pass that raised has left gathered: the parameters of its modules are copies until then."""
    for root in roots(module):
        if _begins_passes(root):
            for state in root._state_ctx.all_states:
                _make_idle(state)


def end_pass(root: Any) -> None:
    """Leaves nothing gathered, or marked as under way, below a root of FSDP (its state)."""
    for state in root._state_ctx.all_states:
        _make_idle(state)
    for group in groups_of(root):
        if group._all_gather_result is not None:
            group.finalize_backward()  # waits for what it has gathered ahead, and drops it
    root._state_ctx.iter_forward_root = None


def _released_if_it_raises(root: nn.Module, forward: Any) -> Any:
    @functools.wraps(forward)
    def released(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except BaseException:
            release_gathered(root)
            raise

    return released


def _begin_pass(state: Any, pre_forward: Any, *args: Any) -> Any:
    _end_earlier_pass(state)
    return pre_forward(*args)


def _end_earlier_pass(state: Any) -> None:
    if not _begins_passes(state):
        return
    if state._state_ctx.post_backward_final_callback_queued:
        forget_gradients_of(state)  # of groups that have not come to their reduction, which other ranks may have
        state._root_post_backward_final_callback()
    end_pass(state)


def _begins_passes(state: Any) -> bool:
    """Whether a call is no part of a pass: of a root around it, or of a checkpoint that repeats it in backward."""
    return state._is_root is not False and torch._C._current_graph_task_id() == -1


def _make_idle(state: Any) -> None:
    idle = type(state._training_state).IDLE
    if state._training_state == idle and not state._modules_to_run_forward:
        return
    state._training_state = idle
    state._modules_to_run_forward.clear()
    if state._fsdp_param_group is not None:
        state._fsdp_param_group._training_state = idle
        state._fsdp_param_group.reshard()
