"""Activation checkpointing of decoder layers that never routes twice.

Every decoder layer runs under `torch.utils.checkpoint` (non-reentrant), which keeps the layer's inputs and, at the
first tensor that backward asks for, runs the layer again until it has every tensor that was saved in forward. The
second run only supplies tensors: gradients flow through the graph of the first. So a module whose first graph keeps
what it needs may be passed over in the second run, and two kinds are:

- **routers**: what they save is small (``[T, E]``, ``[T, K]``) and stays, so that ids, weights and counts are
  those of forward, whatever a second run would round. Only their input ``[T, H]`` is large: left to the checkpoint.
- **experts**: the MoE body keeps its tensors on its own ctx. ``selective`` keeps them all. ``full`` keeps the dispatch
  plan (ids, weights, split sizes, the order by expert); the checkpoint supplies the hidden states, and backward sends
  their rows again, under the first of its GEMMs, and repeats the up projection.

A `_Recording` (first run) and a `_Replay` (second run), the two contexts of one checkpoint, share a note of every such
call: how often it left its input to the checkpoint, and what it returned. Outputs are kept only where the layer saves
something after the call (shared experts do so after the routed ones). Nothing is kept on modules; what a call leaves
dies with its graph.

Calls are intercepted before the hooks of their module (FSDP's, metrics'), so that a second run gathers no parameters
and counts no token twice; the layer is intercepted behind its hooks, so that FSDP gathers it once per backward. Names
of parameters and modules stay as they are. With ``compile`` the checkpoint lies around the compiled layer: inside it,
Dynamo would give the whole layer up at the first graph break.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar, Token
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from lightning_ep import transformers_adapter as adapter
from lightning_ep.layers.buffers import Buffers, copied_buffers, in_place
from lightning_ep.layers.compilation import compile_forward
from lightning_ep.moe.dispatch import ExplainedOutOfMemoryError
from lightning_ep.moe.experts import expert_context

ActivationCheckpointing = Literal["none", "selective", "full"]
Later = Callable[[], Tensor]
"""Returns, in backward, a tensor that was left to the checkpoint."""

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0")
_CAST = "ToCopyBackward0"


def check_mode(mode: str) -> None:
    """Raises ValueError unless ``mode`` is a choice of ``activation_checkpointing``."""
    choices = get_args(ActivationCheckpointing)
    if mode not in choices:
        raise ValueError(
            f"activation_checkpointing={mode!r} does not exist; choose 'none' (keep every activation), 'selective' "
            "(recompute the layers, keep their experts' rows) or 'full' (keep only each layer's input and routing)."
        )


def checkpoint_layer(
    layer: nn.Module,
    routers: list[nn.Module],
    experts: list[nn.Module],
    mode: ActivationCheckpointing,
    compile: bool,
) -> None:
    """Makes a decoder layer recompute itself in backward, in place.

    Args:
        layer: The layer.
        routers: Its routers; the first tensor of their arguments is ``[..., H]``.
        experts: Its expert-parallel experts modules.
        mode: ``"selective"`` or ``"full"``.
        compile: Compile the layer inside the checkpoint, around its routers.
    """
    for router in routers:
        if compile:
            # A graph break of its own, at which the layer's code really calls the router. It runs as it is: its few
            # kernels cost the host less than another graph.
            router.forward = torch.compiler.disable(router.forward)
    for module in experts if mode == "full" else ():
        expert_context(module).leave = left_to_checkpoint
    for module in (*routers, *experts):
        # What `nn.Module.compile` sets, too: called in place of the module and its hooks.
        module._compiled_call_impl = functools.partial(_call, module)
    forward = compile_forward(layer) if compile else layer.forward
    unfilled: WeakSet[Any] = WeakSet()
    passed_over = {child for module in (*routers, *experts) for child in module.modules()}
    runs_again = [child for child in layer.modules() if child not in passed_over]

    @functools.wraps(layer.forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        _refuse_unfilled(adapter.given_cache(kwargs), unfilled)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        kwargs = _without_cache(kwargs, unfilled)
        # As they are now: layers may write into them what later ones read.
        dicts = {key: copy(value) for key, value in kwargs.items() if isinstance(value, MutableMapping)}
        function = functools.partial(_run, forward, kwargs, dicts, copied_buffers(runs_again))
        return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts)

    layer.forward = checkpointed


def _run(
    forward: Callable[..., Any], kwargs: dict[str, Any], dicts: dict[str, Any], buffers: Buffers, *args: Any
) -> Any:
    """Runs a layer; for the second time on ``dicts`` and ``buffers``, as they were for the first."""
    if not isinstance(_active.get(), _Replay):
        return forward(*args, **kwargs)
    with in_place(buffers):
        return forward(*args, **{**kwargs, **{key: copy(value) for key, value in dicts.items()}})


def _without_cache(kwargs: Mapping[str, Any], unfilled: WeakSet[Any]) -> dict[str, Any]:
    """A cache would be filled twice, so it is left empty: mostly it is one that the model made and nobody reads."""
    cache = adapter.given_cache(kwargs)
    if cache is None:
        return dict(kwargs)
    if cache.get_seq_length() > 0:
        raise ValueError(
            "past_key_values that hold tokens cannot be combined with activation_checkpointing: recomputed layers "
            "would add theirs a second time. Use activation_checkpointing='none', or no cache."
        )
    unfilled.add(cache)
    return adapter.without_cache(kwargs)


def _refuse_unfilled(cache: Any, unfilled: WeakSet[Any]) -> None:
    if cache is not None and cache in unfilled:
        raise ValueError(
            "past_key_values were in a training forward under activation_checkpointing before, which fills no cache: "
            "the tokens of that forward would be missing. Use activation_checkpointing='none', or no cache."
        )


def left_to_checkpoint(hidden: Tensor) -> Later | None:
    """Leaves the hidden states of the experts that are running to the checkpoint around them.

    Returns:
        What gives them back in backward, once; None where the experts must keep their tensors themselves.
    """
    active = _active.get()
    return active.leave_input(hidden) if isinstance(active, _Recording) else None


@dataclass
class _Output:
    """A tensor that a call returned, for the code of the layer after it.

    Attributes:
        tensor: The tensor; once the layer has returned, without its graph, or None if nobody will need it.
        version: Its version when it was returned.
        requires_grad: Whether it required a gradient.
        like: Makes a tensor of its shape.
    """

    tensor: Tensor | None
    version: int
    requires_grad: bool
    like: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> _Output:
        like = functools.partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return cls(tensor, tensor._version, tensor.requires_grad, like)

    def keep(self) -> None:
        assert self.tensor is not None
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that a router or experts returned was modified in place "
                "afterwards, so that activation_checkpointing cannot return it again. Change the model to modify a "
                "copy, or use activation_checkpointing='none'."
            )
        self.tensor = _without_graph(self.tensor)

    def again(self) -> Tensor:
        # Where nothing was saved after the call, nothing that is computed from it is used.
        value = self.like() if self.tensor is None else self.tensor
        # Where it had a history it gets one, and is no leaf, which code may not modify.
        return value.detach().requires_grad_().clone() if self.requires_grad else value.clone()


@dataclass
class _Call:
    """What a call of a router or of experts leaves for the second run.

    Attributes:
        module: What was called.
        left: How often it left its input to the checkpoint.
        outputs: What it returned, with `_Output` in place of tensors.
        noted: All of these.
        saved_before: Tensors that the layer had saved when it returned.
        random: State of the random generator after it, if it drew numbers.
    """

    module: nn.Module
    left: int = 0
    outputs: Any = None
    noted: list[_Output] = field(default_factory=list)
    saved_before: int = 0
    random: Tensor | None = None

    def note(self, tensor: Tensor) -> _Output:
        self.noted.append(_Output.of(tensor))
        return self.noted[-1]


class _Recording:
    """The context of the first run: notes every call, and how much the layer saves."""

    def __init__(self, calls: list[_Call]) -> None:
        self._calls = calls
        self._num_saved = 0
        self._sources: list[list[Tensor]] = []  # of the calls in progress

    def __enter__(self) -> None:
        self._checkpoint_pack, self._checkpoint_unpack = _top_hooks()
        self._hooks = saved_tensors_hooks(self._pack, self._checkpoint_unpack)
        self._hooks.__enter__()
        self._token: Token[Any] = _active.set(self)

    def __exit__(self, *exception: object) -> None:
        _active.reset(self._token)
        self._hooks.__exit__()
        del self._hooks  # a circle of references would keep the layer's input until Python looks for circles
        if exception[0] is not None:
            return
        for call in self._calls:
            for output in call.noted:
                if call.saved_before < self._num_saved:
                    output.keep()
                else:
                    output.tensor = None

    def _pack(self, tensor: Tensor) -> Any:
        self._num_saved += 1
        return self._checkpoint_pack(tensor)

    def leave_input(self, hidden: Tensor) -> Later:
        """As `leave`; where a hook has made ``hidden`` of the input, which the second run does not see, it is kept.

        Rows travel again in either case: whether they do is the same on all ranks.
        """
        source = self._sources[-1][0]
        if hidden is source or (hidden.dtype == source.dtype and _is_copy(hidden, source)):
            return self.leave(hidden)
        kept = _without_graph(hidden)
        return lambda: kept

    def leave(self, hidden: Tensor) -> Later:
        """Leaves the input of the call in progress to the checkpoint, once more."""
        self._calls[-1].left += 1
        packed, unpack = self._pack(hidden), self._checkpoint_unpack

        def later() -> Tensor:
            try:
                return unpack(packed)
            except torch.OutOfMemoryError as error:
                # Whoever asks is the backward of the experts or of a router, and neither is what ran.
                raise ExplainedOutOfMemoryError(
                    "Out of memory while a decoder layer ran again in backward (activation_checkpointing) up to its "
                    "experts: in its attention, norms or dense parts. Use fewer tokens per batch, or share each "
                    f"sequence among ranks (tp, cp). {error}"
                ) from error

        return later

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = _Call(module)
        self._calls.append(call)
        source = [_first_tensor(args, kwargs)]
        version, generator = source[0]._version, _generator(source[0].device)
        random = generator.get_state()

        def pack(tensor: Tensor) -> Any:
            if not _is_copy(tensor, source[0]):
                return _without_graph(tensor)
            later, shape, dtype = self.leave(source[0]), tensor.shape, tensor.dtype
            return lambda: later().to(dtype).reshape(shape)

        self._sources.append(source)
        try:
            with saved_tensors_hooks(pack, _unpack):
                outputs = module._call_impl(*args, **kwargs)
        finally:
            self._sources.pop()
        if source[0]._version != version:
            raise RuntimeError(
                f"{type(module).__name__} modified its input in place, which activation_checkpointing cannot do a "
                "second time. Change the model to modify a copy, or use activation_checkpointing='none'."
            )
        if not torch.equal(now := generator.get_state(), random):
            call.random = now
        source.clear()  # the graph keeps its hooks, and they would keep the tensor
        call.outputs = _map(call.note, Tensor, outputs)
        call.saved_before = self._num_saved
        return outputs


class _Replay:
    """The context of the second run: answers every call as the first run noted it."""

    def __init__(self, calls: list[_Call]) -> None:
        self._calls = calls

    def __enter__(self) -> None:
        self._checkpoint_pack, _ = _top_hooks()
        self._next: Iterator[_Call] = iter(self._calls)
        self._token: Token[Any] = _active.set(self)

    def __exit__(self, *exception: object) -> None:
        _active.reset(self._token)

    def call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = next(self._next, None)
        if call is None or call.module is not module:
            raise RuntimeError(
                f"a layer called {type(module).__name__} when it was recomputed and not at that point in its forward. "
                "Layers under activation_checkpointing must do the same both times; use 'none' for this model."
            )
        hidden = _first_tensor(args, kwargs)
        for _ in range(call.left):
            self._checkpoint_pack(hidden)  # ends the second run when it was the last tensor asked for
        if call.random is not None:
            _generator(hidden.device).set_state(call.random)
        return _map(_Output.again, _Output, call.outputs)


def _generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


_active: ContextVar[_Recording | _Replay | None] = ContextVar("lightning_ep_checkpoint", default=None)


def _contexts() -> tuple[_Recording, _Replay]:
    calls: list[_Call] = []
    return _Recording(calls), _Replay(calls)


@torch.compiler.disable
def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    active = _active.get()
    if active is None:
        return module._call_impl(*args, **kwargs)
    return active.call(module, args, kwargs)


def _top_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Those of the checkpoint, when its contexts are entered."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    assert hooks is not None
    return hooks


def _without_graph(tensor: Tensor) -> Tensor:
    """The same memory for a graph to hold that ``tensor`` itself belongs to, and that would else hold itself for ever.

    `detach` is not enough: as a view, its result refers to ``tensor``.
    """
    return tensor.data


def _unpack(packed: Tensor | Later) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()


def _map(function: Callable[[Any], Any], kind: type, value: Any) -> Any:
    """``value`` with every ``kind`` in it, or in its tuples, mapped."""
    if isinstance(value, tuple):
        return tuple(_map(function, kind, part) for part in value)
    return function(value) if isinstance(value, kind) else value


def _first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _is_copy(tensor: Tensor, source: Tensor) -> bool:
    """Whether ``tensor`` is ``source`` in another shape or dtype, so that it can be made of it again."""
    if tensor.numel() != source.numel() or tensor.device != source.device:
        return False
    if not (tensor.is_contiguous() and source.is_contiguous()):
        return False
    if tensor.dtype == source.dtype and tensor.data_ptr() == source.data_ptr():
        return True
    casts, node = 0, tensor.grad_fn
    while node is not None and node is not source.grad_fn:
        casts += node.name() == _CAST
        if casts > 1 or node.name() not in (*_VIEWS, _CAST):
            return False
        node = node.next_functions[0][0]
    return node is not None
