"""Adapters as files: what PEFT reads, and what vLLM reads where it holds experts one by one.

vLLM 0.33 (`vllm/lora/lora_model.py`, `vllm/lora/model_manager.py`) looks for the factors of every projection of every
expert under its name on the hub (``...experts.7.gate_proj.lora_A.weight``), all of them with one rank. Models that it
holds with fused experts (gpt_oss) take PEFT's file.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from lightning_ep import transformers_adapter as adapter
from lightning_ep.distributed.agreement import Ranks
from lightning_ep.distributed.shards import whole
from lightning_ep.hub.beneath import Beneath, Beside, beneath
from lightning_ep.hub.directory import HubDirectory, check_place, check_same_path
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.meta_models import meta_model
from lightning_ep.hub.problems import Problems
from lightning_ep.hub.source import found_from_anywhere, source_directory
from lightning_ep.hub.trace import Piece
from lightning_ep.hub.writer import plan_groups
from lightning_ep.moe.adapted import ExpertFactor, flat

AdapterFormat = Literal["peft", "vllm"]
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
_RANKS_IN_VLLM = (8, 16, 32, 64, 128, 256, 320, 512)  # what its server can be told to make room for
_NOT_IN_VLLM = {
    "modules_to_save": "modules that are trained whole",
    "use_dora": "DoRA",
    "lora_bias": "biases beside adapters",
    "rank_pattern": "ranks by patterns, which would name other modules there",
    "alpha_pattern": "scales by patterns, which would name other modules there",
}


def export_adapters(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Any | None = None,
    file_format: AdapterFormat = "peft",
) -> None:
    """Writes the adapter of a model, sharded or not, as a new directory. Every rank must call it.

    Args:
        model: A transformers model with PEFT's modules.
        path: The directory, on a filesystem that all ranks share. It appears when it is complete.
        dtype: What tensors are in the file. Default: what they are in the model.
        tokenizer: Anything with ``save_pretrained``. Default: tokenizer files of the checkpoint the model came from.
        file_format: ``"peft"``, or ``"vllm"`` for experts under the names that vLLM reads.

    Raises:
        CheckpointError: On every rank, if the adapter cannot be written so, or the first rank could not write.
    """
    check_adapters(model, path, dtype, tokenizer, file_format)
    state = adapter_state(model)

    def write() -> None:
        directory = HubDirectory(path)
        directory.create()
        write_adapters(model, state, directory, dtype, tokenizer, source_directory(model), file_format)

    Ranks(CheckpointError).on_first(f"the adapter was not written to {path}", write)


def check_adapters(
    model: PreTrainedModel,
    path: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Any | None = None,
    file_format: AdapterFormat = "peft",
) -> None:
    """Raises CheckpointError, on every rank, for all that `export_adapters` would fail for; leaves nothing behind."""
    problems = Problems(f"{path} could not be written at the end of the run:")
    check_same_path(path, problems)
    problems.add("adapters", *why_not_written(model, file_format))
    problems.raise_on_all_ranks()
    ranks = Ranks(CheckpointError)

    def begin() -> int:
        directory = HubDirectory(path)
        directory.create()
        directory.write_companions(model, tokenizer, source_directory(model))
        found = in_format(model, _on_meta(dict(model.state_dict())), file_format)
        return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in found.values())

    check_place(path, ranks.on_first(problems.headline, begin), ranks.rank == 0, problems)


def why_not_written(model: PreTrainedModel, file_format: AdapterFormat) -> list[str]:
    """What a format cannot hold of a model's adapters; empty if it is all."""
    configs = adapter.peft_configs(model)
    if len(configs) != 1:
        return [f"the model has {len(configs)} ({', '.join(configs)}), and a file holds one"]
    (config,) = configs.values()
    wrong = []
    if left_out := _left_out(model):
        wrong.append(
            f"{len(left_out)} trained parameters are no part of the adapter, as {left_out[0]}: name their modules in "
            "modules_to_save, or write the whole model with `merge`"
        )
    if file_format == "vllm":
        below = beneath(model)
        wrong += below.problems
        wrong += [f"vLLM reads no {what} ({name})" for name, what in _NOT_IN_VLLM.items() if getattr(config, name)]
        try:
            _names_in_vllm(model, below)
        except CheckpointError as error:
            wrong.append(str(error))
    return wrong


def write_adapters(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    directory: HubDirectory,
    dtype: torch.dtype | None,
    tokenizer: Any | None,
    files_from: Path | None,
    file_format: AdapterFormat,
) -> None:
    """Writes an adapter in one process, into a directory that has been created.

    Args:
        model: The model, whose weights are not looked at.
        state: As `adapter_state` returned it.
        directory: The directory.
        dtype: What tensors are in the file.
        tokenizer: The tokenizer.
        files_from: A directory with tokenizer files, if there is no ``tokenizer``.
        file_format: The format.
    """
    (config,) = (deepcopy(config) for config in adapter.peft_configs(model).values())
    tensors = in_format(model, state, file_format)
    if file_format == "vllm":
        modules = {key.removesuffix(".weight").rpartition(".")[0] for key in tensors}
        config.target_modules = sorted({name.rpartition(".")[2] for name in modules})
        config.target_parameters = None
    config.inference_mode = True
    if config.base_model_name_or_path:  # PEFT keeps what was typed
        config.base_model_name_or_path = found_from_anywhere(config.base_model_name_or_path)
    config.save_pretrained(str(directory.temporary))
    # Copies, since tied weights share memory, which safetensors refuses.
    contents = {key: tensor.to(dtype or tensor.dtype, copy=True).contiguous() for key, tensor in tensors.items()}
    # Not `save_file`, whose files nobody else may read, a server's user for example.
    (directory.temporary / WEIGHTS).write_bytes(save(contents, metadata={"format": "pt"}))
    chats = directory.write_companions(model, tokenizer, files_from)
    card = _card(directory.path.name, config, file_format, chats)
    (directory.temporary / "README.md").write_text(card)
    directory.publish()


@torch.no_grad()
def adapter_state(model: Any, selected: list[str] | None = None) -> dict[str, Tensor]:
    """The model's state with what PEFT saves of it whole, flat and on the CPU, the rest on meta.

    Every rank must call it; all but the first of the job get all on meta.
    """
    state: dict[str, Tensor] = model.state_dict()
    saved = _saved_by_peft(model, selected)
    first = Ranks(CheckpointError).rank == 0
    found = _on_meta(state)
    for name in saved:
        tensor = whole(state[name])
        if first:
            found[name] = tensor
    return flattened(model, found)


def flattened(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's state with factors of experts as PEFT's files have them."""
    found = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, ExpertFactor) and found[key := f"{name}.weight"].ndim == 3:
            found[key] = flat(found[key], module.is_a).contiguous()
    return found


def in_format(model: PreTrainedModel, state: dict[str, Tensor], file_format: AdapterFormat) -> dict[str, Tensor]:
    """The tensors of a file of adapters.

    Args:
        model: The model.
        state: Its tensors by name, whole, also on meta; those of experts as PEFT has them or expert by expert.
        file_format: The format.
    """
    state = flattened(model, state)
    if file_format == "peft":
        (name,) = adapter.peft_configs(model)
        return {f"{PREFIX}{key}": state[place] for key, place in _keys_in_peft(model, name).items()}
    found = {}
    for key, (beside, piece) in _names_in_vllm(model, beneath(model)).items():
        a, b = beside.factors(state[beside.a], state[beside.b])
        region, rows = piece.source_region(), piece.dims[0]
        assert rows is not None
        if beside.num_experts is not None:
            a, b = a[region.start[0]], b[region.start[0]]
        found[f"{PREFIX}{key}.lora_A.weight"] = a
        found[f"{PREFIX}{key}.lora_B.weight"] = b.narrow(0, region.start[rows], region.size[rows])
    return found


def _names_in_vllm(model: PreTrainedModel, below: Beneath) -> dict[str, tuple[Beside, Piece]]:
    """Modules on the hub that are adapted, with the rows of which weight each is.

    Raises:
        CheckpointError: If the hub has experts in other forms than one matrix per projection.
    """
    plain = meta_model(model.config, adapter.model_class(model))
    dtypes = {name: tensor.dtype for name, tensor in below.tensors.items()}
    found: dict[str, tuple[Beside, Piece]] = {}
    adapted_experts: dict[str, set[bool]] = {}
    for group in plan_groups(plain, dtypes):
        for part in group.parts:
            piece = part.pieces[0]
            beside = below.beside.get(piece.key)
            owner = piece.key.rpartition(".")[0]
            if len(part.shape) == 2 and len(piece.source) == 3:
                adapted_experts.setdefault(owner, set()).add(beside is not None)
            if beside is None:
                continue
            name, last = part.key.removesuffix(".weight"), len(piece.source) - 1
            dims = (last, last - 1) if beside.is_transposed else (last - 1, last)  # out, in
            if group.opaque or len(part.pieces) != 1 or piece.dims != dims or name == part.key:
                raise CheckpointError(
                    f"{part.key} is not one matrix of one expert on the hub: vLLM holds such experts fused, and reads "
                    "PEFT's own format for them"
                )
            found[name] = beside, piece
    if partly := [owner for owner, adapted in adapted_experts.items() if adapted == {True, False}]:
        raise CheckpointError(
            f"vLLM needs adapters on all projections of experts or on none, and of {partly[0]} some have none"
        )
    return found


def _left_out(model: Any) -> list[str]:
    """Names of trained parameters that PEFT does not save."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    saved = {id(state[name]) for name in _saved_by_peft(model)}
    return [name for name, param in model.named_parameters() if param.requires_grad and id(param) not in saved]


def _saved_by_peft(model: Any, selected: list[str] | None = None) -> list[str]:
    """Names in the model's state of what PEFT saves of its adapters."""
    names = selected or adapter.peft_configs(model)
    return list({place: None for name in names for place in _keys_in_peft(model, name).values()})


@dataclass(frozen=True)
class _Keys:
    """What is remembered of a model: of each adapter, where in the model's state the tensors of PEFT's file are."""

    places: dict[str, dict[str, str]] = field(default_factory=dict)


def _keys_in_peft(model: Any, adapter_name: str) -> dict[str, str]:
    """The names in PEFT's file, without their prefix, with those in the model's state.

    Asked once for each adapter: PEFT may look at the hub to find out whether embeddings have been resized.
    """
    from peft import get_peft_model_state_dict

    if (keys := adapter.recall(model, _Keys)) is None:
        adapter.remember(model, keys := _Keys())
    if adapter_name not in keys.places:
        named = _on_meta(model.state_dict())
        names = {id(tensor): name for name, tensor in named.items()}
        saved = get_peft_model_state_dict(model, named, adapter_name=adapter_name)
        keys.places[adapter_name] = {key: names[id(tensor)] for key, tensor in saved.items()}
    return keys.places[adapter_name]


def _on_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}


def _card(name: str, config: Any, file_format: AdapterFormat, chats: bool) -> str:
    """The README of an adapter: what the hub reads of it, and how to use and upload it."""
    base: str | None = config.base_model_name_or_path
    on_hub = base is not None and not Path(base).is_absolute()
    of = f"`{base}`" if on_hub else "a model that is not on the hub"
    if base is not None and not on_hub:
        of += (
            f": where this was written it was `{base}`. Elsewhere put that model's place into `adapter_config.json`, "
            "as `base_model_name_or_path`"
        )
    rank = next((size for size in _RANKS_IN_VLLM if size >= config.r), config.r)
    served = f"vllm serve {base or 'BASE'} --enable-lora --max-lora-rank {rank} --lora-modules {name}=."
    talk = "lightning-ep generate . --chat" if chats else 'lightning-ep generate . --prompt "Once upon a time"'
    use = f"""Try it in a terminal:

```bash
{talk}
```

Load it with peft:

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(".")
```
"""
    if file_format == "vllm":
        use = f"""Its experts have the names that vLLM reads; peft does not. Serve it, inside this directory:

```bash
{served}
```
"""
    return f"""---
library_name: peft
{f"base_model: {base}{chr(10)}" if on_hub else ""}tags:
- lora
- lightning_ep
---

# {name}

An adapter (LoRA), exported by lightning_ep, of {of}.

{use}
Upload it to the Hugging Face hub (after `hf auth login`):

```bash
hf upload YOUR_NAME/{name} .
```
"""
