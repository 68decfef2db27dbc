"""The command ``lightning-ep plan``: which layout, does it fit, how fast, is EP worth it. Needs no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from lightning_ep.planner import report
from lightning_ep.planner.candidates import Request, choose, fitting, smallest
from lightning_ep.planner.devices import GPUS, find_device
from lightning_ep.planner.families import find_model, shipped
from lightning_ep.planner.recipe import write_recipe
from lightning_ep_start import fail
from lightning_ep_start.recipes import Parser, names

_EXAMPLE = "lightning-ep plan Qwen/Qwen3-30B-A3B --gpus 16 --gpu H100 --sequence_length 32768 --tokens_per_step 1048576"


def main(arguments: list[str]) -> None:
    """Runs ``lightning-ep plan``; ends the program with 1 where nothing fits, with 2 where the question is wrong.

    Args:
        arguments: Those after the command's name.
    """
    options = _parser().parse_args(arguments)
    try:
        request = _request(options)
        found = fitting(request)
        _print(map(_wrapped, report.heading(request)))
        if not found:
            _end_without(request)
        chosen = choose(found)
        _print(["", *report.table(found, chosen, options.rows, options.tokens), ""])
        _print(map(_wrapped, [*report.reasons(request, found, chosen), report.unmeasured(request, chosen)]))
        if options.yaml:
            print(f"\n{write_recipe(Path(options.yaml), request, chosen, options.tokens)}")
    except ValueError as error:
        fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lightning-ep plan",
        description="Estimates time and memory of every layout that a model allows on so many GPUs, the best first. It "
        "starts no process and needs no GPU.",
        epilog=f"example: {_EXAMPLE}",
    )
    add = parser.add_argument
    add("model", help=f"a directory, a config.json, an id in the hub's cache, or one of {', '.join(shipped())}")
    add("--gpus", type=_count, required=True, help="all GPUs")
    add("--gpu", default="H100", help=f"their type: {', '.join(GPUS)}; default: H100")
    add("--gpus_per_node", type=_count, default=8, help="default: 8")
    add("--sequence_length", type=_count, default=4096, help="tokens per sequence; default: 4096")
    add("--tokens_per_step", type=_count, help="of all GPUs in an optimizer step; default: whatever is fastest")
    add("--tokens", type=_count, default=10**9, help="tokens to train on, as 1e9; default: 1e9")
    add("--precision", default="bf16-mixed", choices=("bf16-mixed", "bf16-true"), help="default: bf16-mixed")
    add(
        "--stochastic_rounding",
        action="store_true",
        help="of moments, which are bf16 then beside fp32 weights: 12 bytes per parameter, not 16 (bf16-true: always)",
    )
    add(
        "--lora_rank",
        type=int,
        default=0,
        help="plan LoRA(r=...), adapters of attention and experts over frozen bf16 weights",
    )
    add("--skew", type=float, default=1.2, help="rows of the busiest rank over the mean of its EP group; default: 1.2")
    add("--network_gbps", type=float, help="Gb/s of the network per GPU; default: what such nodes are sold with")
    add("--memory_gib", type=float, help="memory of a GPU; default: that of its type")
    add("--rows", type=_count, default=10, help="layouts to print; default: 10")
    add("--yaml", metavar="FILE", help="write the chosen layout as a recipe")
    return parser


def _request(options: argparse.Namespace) -> Request:
    device = GPUS.get(options.gpu.upper()) or find_device(options.gpu)
    if device is None:
        raise ValueError(f"--gpu {options.gpu} is not known; choose one of {', '.join(GPUS)}.")
    if options.model in names() or options.model.endswith((".yaml", ".yml")):
        raise ValueError(f"{options.model} is a recipe; plan takes a model, such as its model.init_args.model.")
    if options.network_gbps is not None:
        device = dataclasses.replace(device, network=_positive("--network_gbps", options.network_gbps) * 1e9 / 8)
    if options.memory_gib is not None:
        device = dataclasses.replace(device, memory_gib=_positive("--memory_gib", options.memory_gib))
    if options.lora_rank < 0:
        raise ValueError(f"--lora_rank {options.lora_rank}: must be positive, or 0 to train all weights.")
    if not 1 <= options.skew < math.inf:
        raise ValueError(f"--skew {options.skew:g}: the busiest rank has at least the mean, so at least 1.")
    return Request(
        find_model(options.model), device, options.gpus, options.gpus_per_node, options.sequence_length,
        options.tokens_per_step, options.precision, options.lora_rank, skew=options.skew,
        stochastic_rounding=options.stochastic_rounding,
    )  # fmt: skip


def _end_without(request: Request) -> None:
    """Says what is missing where nothing fits, and ends the program."""
    least = smallest(request)
    if least is None:
        raise ValueError(
            f"no layout of {request.ranks} GPUs makes steps of {request.tokens_per_step or 0:,} tokens from sequences "
            f"of {request.sequence:,}: groups of ranks that share a batch need as many whole sequences each. Use a "
            f"multiple of {request.ranks * request.sequence:,} tokens per step, or fewer GPUs."
        )
    print(f"\n{_wrapped(report.nothing_fits(request, least))}")
    sys.exit(1)


def _count(text: str) -> int:
    """A positive integer, also as ``1e9`` or ``1_000``."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf or value != int(value):
        raise argparse.ArgumentTypeError(f"{text}: must be a positive integer.")
    return int(value)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} {value:g}: must be positive, and a number.")
    return value


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)
