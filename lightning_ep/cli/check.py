"""The command ``lightning-ep check``: is this layout right, on these processes, and are the links between them well?"""

from __future__ import annotations

import copy
import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import yaml
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from lightning_ep.cli.compared import Comparison, compare, cut_to_fit, on_one_process
from lightning_ep.cli.links import Link, measure_links
from lightning_ep.cli.opened import process_group
from lightning_ep.context_parallel import piece_of
from lightning_ep.distributed.agreement import from_all_ranks
from lightning_ep.hub.meta_models import config_of, from_config
from lightning_ep.layout import ParallelLayout
from lightning_ep.moe.expert_parallel import expert_plan
from lightning_ep.parallelize import check as check_rules
from lightning_ep.planner import Case, find_model, read_widths, traffic
from lightning_ep.planner.families import FAMILIES, shipped
from lightning_ep_start import recipes

# In fp32 a right layout differs by 1e-6. A token two of whose experts are as good as each other may go to the other
# one, which is about 1e-2 of a layer's gradient: what routers choose is compared, too.
_TOLERANCE, _TOLERANCE_IF_MOVED, _MOVED = 1e-3, 5e-2, 1e-3
# In bf16 choices between experts that differ by 1e-2 are made otherwise, and what follows from them differs: two H200
# made 0.7 % of the choices of four layers of Qwen3-30B-A3B otherwise, and differed by 8e-3 and (gradients) 1.4e-2.
_TOLERANCE_BF16, _MOVED_BF16 = 0.05, 0.05
_TOLERANCE_BF16_ONE = 0.4  # of the gradients of one router, which see those choices most: 0.1 with tiny models
_LEAST_TOKENS = 16
_OF_MEMORY = 0.4  # of what is free; activations and buffers take some

Size = int | Literal["auto"]


def check(
    model_name_or_path: str | None = None,
    ep_size: Size | None = None,
    fsdp_size: Size | None = None,
    replicate: int | None = None,
    tp_size: int | None = None,
    cp_size: int | None = None,
    seq_len: int = 512,
) -> None:
    """Compares a layout with one process, logits and every gradient, after a look at the links; ends with 1 if wrong.

    The model has random weights in fp32, and its real widths where those fit beside a copy of it on every rank: else it
    is cut in depth, and that is said. Under torchrun it is sharded over all processes:
    torchrun --nproc-per-node 8 -m lightning_ep check --model_name_or_path Qwen/Qwen3-30B-A3B --ep_size 8

    Args:
        model_name_or_path: A directory or an id of the hub, a config.json, a model that `lightning-ep plan` knows, or a
            recipe, whose layout is taken where no size is given here. It must be given.
        ep_size: Processes that share one set of experts. Default: all of a node.
        fsdp_size: Processes that share the matrices of each expert. Default: what the others leave.
        replicate: Copies of the model. Default: 1.
        tp_size: Processes that share the matrices of attention. Default: 1.
        cp_size: Processes that share sequences. Default: 1.
        seq_len: Tokens of a sequence.

    Raises:
        ValueError: If the layout fits neither the processes nor the model.
    """
    if model_name_or_path is None:
        raise ValueError("check needs --model_name_or_path: a directory, a hub id, a config.json or a recipe.")
    if seq_len < _LEAST_TOKENS:
        raise ValueError(f"--seq_len {seq_len}: so few tokens say little of routers; use {_LEAST_TOKENS} or more.")
    name, sizes = _asked(model_name_or_path)
    given = {"ep": ep_size, "fsdp": fsdp_size, "replicate": replicate, "tp": tp_size, "cp": cp_size}
    sizes |= {size: value for size, value in given.items() if value is not None}
    config = _config(name)
    with process_group() as device:
        world = dist.get_world_size()
        node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        layout = ParallelLayout.resolve(
            sizes.get("ep", "auto"), sizes.get("fsdp", "auto"), world, node,
            *(sizes.get(size, 1) for size in ("replicate", "tp", "cp")),
        )  # fmt: skip
        problems = _examine(config, layout, node, device, seq_len)
        if dist.get_rank() == 0:
            print("passed" if not problems else f"FAILED: {'; '.join(problems)}")
    if problems:
        sys.exit(1)


def _asked(name: str) -> tuple[str, dict[str, Any]]:
    """The model and the sizes of a recipe; of anything else its name, and no sizes."""
    if not name.endswith(".yaml") and name not in recipes.names():
        return name, {}
    recipe = yaml.safe_load(Path(recipes.file_of(name)).read_text())
    strategy = recipe.get("trainer", {}).get("strategy", {})
    init = strategy.get("init_args", {}) if isinstance(strategy, dict) else {}
    model = recipe.get("model", {}).get("init_args", {}).get("model")
    if model is None:
        raise ValueError(f"{name} names no model: it has no model.init_args.model.")
    return model, {size: init[size] for size in ("ep", "fsdp", "replicate", "tp", "cp") if size in init}


def _config(name: Any) -> PreTrainedConfig:
    """The configuration of the whole model; of one that `plan` knows without the network."""
    config = config_of(name) if isinstance(name, dict) else _named_config(name)  # a recipe's own
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{name}: {config.model_type} is no causal language model of transformers, which is what is checked."
        )
    return config


def _named_config(name: str) -> PreTrainedConfig:
    short = {entry.rpartition("/")[2].lower(): entry for entry in shipped()}
    if not Path(name).exists() and (name in shipped() or name.lower() in short):
        return AutoConfig.for_model(**find_model(name).config)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name} is no model that can be opened here: {reason} Without the network there are directories, files "
            f"of configurations, and {', '.join(shipped())}."
        ) from error


def _examine(
    whole: PreTrainedConfig, layout: ParallelLayout, node: int, device: torch.device, sequence: int
) -> list[str]:
    """Prints what is found, on the first rank, and returns what is wrong, on all."""
    config, cut = cut_to_fit(whole, min(from_all_ranks(_free_bytes(device))))
    model = from_config(copy.deepcopy(config))  # which it changes
    check_rules(model, layout, expert_plan(model))
    meshes = layout.build_meshes(device.type)
    sizes = ", ".join(f"{name}={getattr(layout, name)}" for name in ("ep", "fsdp", "replicate", "tp", "cp"))
    _print(f"{whole.model_type} on {layout.world_size} x {_name(device)}: {sizes}; {cut or 'all of it'}", "")
    links = measure_links(meshes, device)
    _print(*(_line(f"link {link.what}", _speed(link), not link.problem) for link in links))
    alone = on_one_process(config, layout, device, sequence)
    found = compare(alone, config, layout, meshes, device, MixedPrecisionPolicy())
    checks = _in_fp32(found)
    _print(*(_line(*one) for one in checks))
    gc.collect()  # the first model, before there is another
    narrow = compare(alone, config, layout, meshes, device, MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    checks += (in_bf16 := _in_bf16(narrow))
    _print(*(_line(*one) for one in in_bf16), "")
    _print(*from_all_ranks(_place(layout, found.num_local_experts, sequence, device)), "")
    _print(*_traffic(whole, layout, node, sequence))
    problems = [f"link {link.what}: {link.problem}" for link in links if link.problem]
    return problems + [f"{what}: {shown}" for what, shown, right in checks if not right]


def _in_fp32(found: Comparison) -> list[tuple[str, str, bool]]:
    """What is compared with one process: its name, what came out, and whether that is right."""
    moved = f"{found.moved:.1%} of choices" if found.moved else "as on one process"
    bound = _TOLERANCE if not found.moved else _TOLERANCE_IF_MOVED
    norms = f"{found.expert_norm:.6g}, on one process {found.expected_norm:.6g}"
    return [
        ("experts that routers choose", moved, found.moved <= _MOVED),
        ("logits beside one process", f"{found.logits:.1e} of their norm", found.logits <= bound),
        ("norm of expert gradients", norms, _close(found, bound)),
        ("gradients, the largest difference", f"{found.gradient:.1e} of {found.parameter}", found.gradient <= bound),
    ]


def _in_bf16(found: Comparison) -> list[tuple[str, str, bool]]:
    """The same of a model that computes as bf16-mixed does, beside one process in fp32."""
    norms = f"{found.expert_norm:.4g}, on one process {found.expected_norm:.4g}"
    return [
        ("in bf16: experts chosen", f"{found.moved:.1%} others", found.moved <= _MOVED_BF16),
        ("in bf16: logits", f"{found.logits:.1e} of their norm", found.logits <= _TOLERANCE_BF16),
        ("in bf16: norm of expert gradients", norms, _close(found, _TOLERANCE_BF16)),
        (
            "in bf16: the largest difference",
            f"{found.gradient:.1e} of {found.parameter}",
            found.gradient <= _TOLERANCE_BF16_ONE,
        ),
        ("in bf16: all gradients", f"{found.gradients:.1e} of their norm", found.gradients <= 2 * _TOLERANCE_BF16),
    ]


def _close(found: Comparison, bound: float) -> bool:
    return abs(found.expert_norm - found.expected_norm) <= bound * found.expected_norm


def _place(layout: ParallelLayout, experts: int, sequence: int, device: torch.device) -> str:
    """Where this rank is in both views, what it holds of experts and sequences, and its memory so far."""
    place = layout.place(dist.get_rank())
    begin, length = piece_of(sequence, layout.cp, place.cp)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes()
    return (
        f"rank {dist.get_rank()}: ep {place.ep} (experts {place.ep * experts} to {(place.ep + 1) * experts - 1}), "
        f"fsdp {place.fsdp}, copy {place.replicate}; batch {place.data}, tp {place.tp}, cp {place.cp} "
        f"(tokens {begin} to {min(sequence, begin + length) - 1}); {memory / 2**30:.1f} GiB at most"
    )


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _traffic(config: PreTrainedConfig, layout: ParallelLayout, node: int, sequence: int) -> list[str]:
    """Bytes that a GPU would send per layer for one such sequence, of the whole model in bf16."""
    if config.model_type not in FAMILIES:
        return [f"bytes per layer: {config.model_type} is not planned"]
    widths, layers = read_widths(config.to_dict())
    case = Case(
        widths, layers, 1, sequence, layout.world_size, layout.ep, layout.cp, tp=layout.tp, replicate=layout.replicate,
        node=node,
    )  # fmt: skip
    sent = {
        "tokens, 4 times": traffic.exchange(case),
        "a gather of experts": traffic.expert_gather(case),
        "sequences, each direction": traffic.sequence_exchange(case),
        "activations for tp, each direction": traffic.tensor_exchange(case),
    }
    return [
        f"per layer in bf16, {what}: {one.link / 2**20:.3f} MiB in the node, {one.network / 2**20:.3f} over the network"
        for what, one in sent.items()
        if one.link or one.network
    ]


def _free_bytes(device: torch.device) -> float:
    """What this rank may take."""
    if device.type == "cuda":
        return _OF_MEMORY * torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return _OF_MEMORY * free / int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _speed(link: Link) -> str:
    normal = f" of {link.normal / 1e9:.0f} that are normal" if link.normal else ""
    return f"{link.rate / 1e9:.3g} GB/s per rank{normal}" + (f": {link.problem}" if link.problem else "")


def _line(what: str, shown: str, right: bool) -> str:
    return f"{'pass' if right else 'FAIL'}  {what:<34} {shown}"


def _print(*lines: str) -> None:
    if dist.get_rank() == 0 and lines:
        print(*lines, sep="\n", flush=True)
