"""Parameters that some ranks' batches use and others' do not, in a group whose others all ranks use.

FSDP2 reduces those of a group that have a gradient on this rank. Where ranks differ in which have one, their
collectives have other sizes, and the process ends or hangs; or the same sizes, and gradients of one parameter are added
to another's, without a word. That is so in a model of one's own that branches by its batch, and in DeepSeek-V4, whose
compressors have nothing to do in sequences that are short.

So what has no gradient beside others that have one is reduced as zeros. On one process it would have none, which
optimizers leave alone where they decay zeros: hence ranks agree in the end which no rank has used, over their hosts, as
`lightning_ep.fsdp.optional_parts` does. They do so in every backward of models that are known to leave some out, or
have done so in one of the first two; for others it would be a wait of the hosts for nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import partial

from torch import nn

from lightning_ep.distributed.agreement import of_any_rank
from lightning_ep.fsdp import state as fsdp
from lightning_ep.fsdp.state import Group, Parameter
from lightning_ep.process_groups import hosts

_ASKED = 2  # backwards in which every model is


class IdleParameters:
    """Those of one root, in more than one process.

    Args:
        root: A module to which `fully_shard` was applied last.
        apart: Groups of it that are agreed on elsewhere.
        by_batch: Whether it is known to use parameters in some batches only.
    """

    def __init__(self, root: nn.Module, apart: Collection[Group], by_batch: bool) -> None:
        groups = [group for group in fsdp.groups_in(root) if group not in apart]
        self._groups = [group for group in groups if len(fsdp.parameters(group)) > 1]
        self._root, self._asks, self._backwards = root, by_batch, 0
        self._used: set[Parameter] = set()
        self._filled: set[Parameter] = set()  # with zeros, of which nothing was there before
        hosts()  # is made here, and not where a rank may have failed
        for group in self._groups:
            fsdp.before_reduction(group, partial(self._fill, group))
        for state in fsdp.states_in(root):
            fsdp.after_backward_ends(state, self._end_backward)

    def _fill(self, group: Group) -> None:
        found = fsdp.which_have_gradients(group)
        if not fsdp.reduces(group) or not any(found):
            return
        params = fsdp.trained(group)
        self._used.update(param for param, has in zip(params, found, strict=True) if has)
        if not all(found):
            idle = [param for param, has in zip(params, found, strict=True) if not has]
            self._filled.update(param for param in idle if fsdp.shard_of(param).grad is None)
            fsdp.add_gradients(group, [True] * len(params))

    def _end_backward(self) -> None:
        if not all(map(fsdp.reduces, self._groups)):
            return  # in the middle of an accumulation window
        self._backwards += 1
        idle = self._filled - self._used
        if self._asks or self._backwards <= _ASKED:
            params = [param for group in self._groups for param in fsdp.parameters(group)]
            *used, some_idle = of_any_rank([*(param in self._used for param in params), bool(idle)])
            self._asks = self._asks or some_idle
            for param, is_used in zip(params, used, strict=True):
                if param in idle and not is_used:
                    fsdp.shard_of(param).grad = None
        elif idle:
            shards = {fsdp.shard_of(param) for param in idle}
            names = [name for name, shard in self._root.named_parameters() if shard in shards]
            warnings.warn(
                f"{len(names)} parameters have no gradient on this rank, which all had in the first {_ASKED} steps "
                f"({', '.join(names[:3])}): they get zeros, by which AdamW decays them where no rank has one.",
                stacklevel=2,
            )
        self._used, self._filled = set(), set()
