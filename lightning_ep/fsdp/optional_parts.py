"""Parts of a model that not every batch uses: towers for images and sound, what projects, adapters on them.

FSDP2 gathers a module when it is called, and reduces it when backward has come through it. Where one rank's batch has
an image and another's has none, ranks then enter different collectives and hang. So these parts have no hooks of
FSDP's: they are gathered where every forward of the root begins, whether they will be called or not, stay gathered (or
are again where its backward begins), and are reduced where every backward of the root ends, in one order on all ranks.

What to reduce is agreed there, parameter by parameter: one that has a gradient on any rank is reduced, with zeros of
the others; one that has none on any keeps ``grad=None``, as on one process, where AdamW would otherwise decay it. It is
an all-reduce of a few hundred bytes between hosts, once per window, for models with such parts that train.

A module beside the model (a value head) is one of its parts, too, which every rank gathers behind the beginning of the
model's forward: steps may call it on some ranks only, once the model was called, and in the model's backward. What
backward comes to it alone ends like one of the root.

Behind a frozen embedding, hidden states would need a gradient on those ranks only whose batch has an image, and
backward come to the decoder on those only: `OptionalParts` has them need one on all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.agreement import of_any_rank
from lightning_ep.fsdp import state as fsdp
from lightning_ep.fsdp.passes import cast_inputs, tensors_in
from lightning_ep.fsdp.state import Group, State
from lightning_ep.moe.idle_experts import EntersAll
from lightning_ep.process_groups import hosts


class OptionalParts:
    """The parts of one root, `remember`ed on it.

    Args:
        root: The model, to which `fully_shard` was applied last.
        units: What FSDP gathers together of its parts: modules to which it was applied together, one list each.
        layers: Layers that may leave out experts.
        embedding: The input embedding.
        mp_policy: The policy of the units.

    Attributes:
        agreed: The groups of which ranks agree what they reduce.
    """

    def __init__(
        self,
        root: nn.Module,
        units: Sequence[Sequence[nn.Module]],
        layers: Sequence[EntersAll],
        embedding: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> None:
        self._parts = [group for unit in units if (group := fsdp.group_of(unit[0])) is not None]
        # The root's own group holds what belongs to no part, as one vector that separates images.
        own = fsdp.group_of(root)
        self.agreed = [*([own] if own is not None else []), *self._parts]
        self._layers = layers
        self._waiting = False
        # Over the GPUs, what ranks say to one another would wait for all that was launched before.
        hosts()  # is made here, and not where a rank may have failed
        for unit in units:
            fsdp.leave_alone(fsdp.state_of(unit[0]))
            for module in unit:
                enter = partial(_enter, fsdp.state_of(root), fsdp.group_of(unit[0]), mp_policy)
                module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        self._root, self._beside = root, list[Group]()
        embedding.register_forward_hook(self._need_gradient)
        root.register_forward_pre_hook(lambda *_: self._gather_beside())  # behind FSDP's, which gathers the root
        fsdp.after_entering(fsdp.state_of(root), self._gather_beside)
        root.register_forward_hook(lambda module, args, output: self._leave_forward(output))
        fsdp.after_every_forward(fsdp.state_of(root), self._leave_forward)
        # Models return what a tower gave, too, which backward reaches last.
        fsdp.begin_backward_once(fsdp.state_of(root), self._begin_backward)
        for state in fsdp.states_in(root):
            fsdp.before_backward_ends(state, self.end_backward)
        adapter.remember(root, self)

    def adopt(self, module: nn.Module, mp_policy: MixedPrecisionPolicy) -> None:
        """Makes a module beside the model one of its parts: a value head, which some ranks' steps do not call.

        It is gathered behind the beginning of every forward of the root, where all ranks come by, and reduced with it.

        Args:
            module: To which `fully_shard` was applied.
            mp_policy: The policy that it was given.
        """
        state, group = fsdp.state_of(module), fsdp.group_of(module)
        if group is None:
            return
        fsdp.leave_alone(state)
        fsdp.await_dropped_gathers(module)
        fsdp.adopt(fsdp.state_of(self._root), state)
        self._beside.append(group)
        self.agreed.append(group)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            fsdp.make_root(fsdp.state_of(self._root))
            self._gather_beside()
            return cast_inputs(mp_policy, args, kwargs)

        module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(lambda module, args, output: self._leave_beside(output))
        fsdp.before_backward_ends(state, self.end_backward)

    def settle(self) -> None:
        """Shards what is beside the model, behind a step without gradients in which a rank may not have called it."""
        for group in self._beside:
            fsdp.let_go(group)

    def _gather_beside(self) -> None:
        for group in self._beside:  # all, in one order, whichever is called first
            fsdp.gather(group)

    def _leave_beside(self, output: Any) -> None:
        if not torch.is_grad_enabled():
            self.settle()
            return
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._backward_beside)

    def _backward_beside(self, grad: Tensor) -> None:
        self._gather_beside()
        fsdp.end_with_this_backward(fsdp.state_of(self._root))

    def end_backward(self) -> None:
        """Agrees on what the groups reduce that no backward has reduced yet; every rank must call it."""
        for group in self.agreed:
            fsdp.know_gradients(group)
        self._waiting = not all(map(fsdp.reduces, self.agreed))
        if not self._waiting:
            self._agree()

    def agree_on_waiting(self) -> bool:
        """Agrees for a window whose last backward did not come to the root; says whether there was any."""
        waiting, self._waiting = self._waiting, False
        if waiting:
            self._agree()
        return waiting

    def _agree(self) -> None:
        found = [fsdp.which_have_gradients(group) for group in self.agreed]
        found += [[experts in layer.used for experts in layer.experts] for layer in self._layers]
        anywhere = iter(of_any_rank([has for part in found for has in part]))
        of_any = [list(islice(anywhere, len(part))) for part in found]
        for group, wanted in zip(self.agreed, of_any[: len(self.agreed)], strict=True):
            fsdp.add_gradients(group, wanted)
        for layer, used in zip(self._layers, of_any[len(self.agreed) :], strict=True):
            layer.forget_idle(used)

    def _need_gradient(self, embedding: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or output.requires_grad:
            return None
        if not any(map(fsdp.trained, self._parts)):
            return None
        return output.detach().requires_grad_().clone()  # a model may write into it, which a leaf forbids

    def _begin_backward(self) -> None:
        for group in self._parts:  # another forward, without gradients, may have let them go
            fsdp.gather(group)

    def _leave_forward(self, output: Any) -> None:
        if not _has_gradient(output):  # else a backward will come, for which the parts stay gathered
            for group in self._parts:
                fsdp.let_go(group)


def parts_in(module: nn.Module) -> list[OptionalParts]:
    """The optional parts of the models in a module."""
    return [found for child in module.modules() if (found := adapter.recall(child, OptionalParts)) is not None]


def _has_gradient(output: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(output))


def _enter(
    root: State, group: Group | None, mp_policy: MixedPrecisionPolicy, module: nn.Module, args: Any, kwargs: Any
) -> Any:
    fsdp.make_root(root)  # features may be asked for before any forward, by all ranks
    if group is not None:  # else the layers inside hold all parameters
        fsdp.gather(group)
    return cast_inputs(mp_policy, args, kwargs)
