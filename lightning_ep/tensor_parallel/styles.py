"""Parallel styles: linear layers that hold a part of their features, and where sequences are split and whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.tensor_parallel.collectives import (
    TensorGroup,
    gather_features,
    gather_rows,
    gather_sequence,
    scatter_rows,
    scatter_sequence,
    split_features,
    split_sequence,
)
from lightning_ep.tensor_parallel.parameters import distribute, local, specialize, split_parameters


class _ColumnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight), local(self.bias))


class _GatheredColumnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return gather_features(F.linear(x, local(self.weight), local(self.bias)), self.tensor_group)  # type: ignore[arg-type]


class _RowLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        group: TensorGroup
        group, takes_whole_input, is_attention = self.tensor_group  # type: ignore[misc]
        out = F.linear(split_features(x, group) if takes_whole_input else x, local(self.weight))
        out = scatter_sequence(out, group) if is_attention else scatter_rows(out, group)
        return out if self.bias is None else out + local(self.bias)  # once, not once per rank


class Colwise(ParallelStyle):
    """A linear layer whose output features are split; takes whole sequences.

    Args:
        gather_output: Every rank gets all output features.
    """

    def __init__(self, gather_output: bool = False) -> None:
        super().__init__()
        self.gather_output = gather_output

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, "weight", device_mesh, Shard(0))
        distribute(module, "bias", device_mesh, Shard(0))
        specialize(module, _GatheredColumnLinear if self.gather_output else _ColumnLinear, TensorGroup.of(device_mesh))
        return module


class Rowwise(ParallelStyle):
    """A linear layer whose input features are split; its summed output is split along the sequence.

    Args:
        takes_whole_input: Every rank is given all input features.
        is_attention: Sequences are the second dimension; else the rows of the first one are split, in any order.
    """

    def __init__(self, takes_whole_input: bool, is_attention: bool) -> None:
        super().__init__()
        self.takes_whole_input = takes_whole_input
        self.is_attention = is_attention

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        distribute(module, "weight", device_mesh, Shard(1))
        distribute(module, "bias", device_mesh, Replicate())
        specialize(module, _RowLinear, (TensorGroup.of(device_mesh), self.takes_whole_input, self.is_attention))
        return module


class _Arguments:
    """Reads and replaces arguments of a forward by name, however they were passed."""

    def __init__(self, module: nn.Module) -> None:
        self.names = list(inspect.signature(module.forward).parameters)
        self.hidden = "hidden_states" if "hidden_states" in self.names else self.names[0]

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        index = self.names.index(name) if name in self.names else len(args)
        return args[index] if index < len(args) else None

    def with_hidden(
        self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.hidden in kwargs:
            return args, {**kwargs, self.hidden: hidden}
        index = self.names.index(self.hidden)
        return (*args[:index], hidden, *args[index + 1 :]), kwargs


def _replace_hidden(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Lets ``module`` see a function of its hidden states."""
    arguments = _Arguments(module)

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return arguments.with_hidden(function(arguments.get(arguments.hidden, args, kwargs)), args, kwargs)

    module.register_forward_pre_hook(replace, with_kwargs=True)


@dataclass
class SequenceLength:
    """Tokens of whole sequences in the forward that runs, as the first decoder layer was given them."""

    value: int = 0


class WholeSequence(ParallelStyle):
    """Around attention: its input is gathered from the ranks' shares of every sequence; its `Rowwise` splits again.

    Args:
        length: That of the model.
        vectors: Names of its own parameters of one element (or row) per head, which are split with the heads.
        ends_whole: It has no `Rowwise`, and every rank's output is whole: this splits it.
    """

    def __init__(self, length: SequenceLength, vectors: tuple[str, ...] = (), ends_whole: bool = False) -> None:
        super().__init__()
        self.length = length
        self.vectors = vectors
        self.ends_whole = ends_whole

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group, arguments = TensorGroup.of(device_mesh), _Arguments(module)

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = arguments.get(arguments.hidden, args, kwargs)
            told = {name: arguments.get(name, args, kwargs) for name in _OF_LENGTH}
            length = _length(told, self.length) or hidden.shape[1] * group.size
            return arguments.with_hidden(gather_sequence(hidden, group, length), args, kwargs)

        def split(module: nn.Module, args: Any, output: Any) -> Any:
            whole, *rest = output if isinstance(output, tuple) else (output,)
            share = split_sequence(whole, group)
            return (share, *rest) if isinstance(output, tuple) else share

        split_parameters(module, self.vectors, device_mesh)
        module.register_forward_pre_hook(gather, with_kwargs=True)
        if self.ends_whole:
            module.register_forward_hook(split)
        return module


_OF_LENGTH = ("position_embeddings", "position_ids", "attention_mask", *sorted(adapter.STATE_NAMES))


def _length(told: dict[str, Any], of_forward: SequenceLength) -> int:
    """Tokens of whole sequences, without what filled the last shares; 0 where nobody needs to know.

    By arguments, which the replay of an earlier call has, too. Without positions attention is causal (`tensor_plan`
    sees to it), so that nothing comes behind what filled, but for a cache, which none replays.
    """
    positions, ids, mask = (told[name] for name in _OF_LENGTH[:3])
    if positions is not None:
        return int((positions if isinstance(positions, Tensor) else positions[0]).shape[-2])
    if ids is not None:
        return int(ids.shape[-1])
    if any(told[name] is not None for name in adapter.STATE_NAMES):
        return of_forward.value
    return 0 if mask is None else int(mask.shape[-1])


class WholeRows(ParallelStyle):
    """Around an MLP, to which tokens are rows: its input is gathered from all ranks; its `Rowwise` splits again."""

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _replace_hidden(module, partial(gather_rows, group=TensorGroup.of(device_mesh)))
        return module


class SplitInput(ParallelStyle):
    """On the first decoder layer: from here on every rank holds its share of each sequence.

    Args:
        length: Is told that of the forward.
    """

    def __init__(self, length: SequenceLength) -> None:
        super().__init__()
        self.length = length

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = TensorGroup.of(device_mesh)

        def split(hidden_BSH: Tensor) -> Tensor:
            self.length.value = hidden_BSH.shape[1]
            return split_sequence(hidden_BSH, group)

        _replace_hidden(module, split)
        return module


class GatherOutput(ParallelStyle):
    """On the model around the decoder layers: what it returns are whole sequences again."""

    @override
    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group, arguments = TensorGroup.of(device_mesh), _Arguments(module)

        def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if isinstance(output, tuple) or getattr(output, "attentions", None) is not None:
                raise ValueError(
                    f"{type(module).__name__} was asked for tuples (return_dict=False) or attention weights "
                    "(output_attentions=True), which tensor parallelism does not gather. Leave them off, or use tp=1."
                )
            inputs = arguments.get("inputs_embeds", args, kwargs)
            batch, length = (arguments.get("input_ids", args, kwargs) if inputs is None else inputs).shape[:2]
            output.last_hidden_state = gather_sequence(output.last_hidden_state, group, length)
            if getattr(output, "hidden_states", None) is not None:
                whole = (x if x is None else gather_sequence(x, group, length) for x in output.hidden_states[:-1])
                output.hidden_states = (*whole, output.last_hidden_state)
            if getattr(output, "router_logits", None) is not None:
                output.router_logits = tuple(
                    gather_sequence(x.view(batch, -1, x.shape[-1]), group, length).flatten(0, 1)
                    for x in output.router_logits
                )
            return output

        def with_whole(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def add(hidden_BCH: Tensor, mask_BS: Tensor, features: Tensor) -> Tensor:
                whole_BSH = gather_sequence(hidden_BCH, group, mask_BS.shape[1])
                return split_sequence(own(whole_BSH, mask_BS, features), group)

            return add

        module.register_forward_hook(gather, with_kwargs=True)
        adapter.wrap_deepstack(module, with_whole)
        return module
