"""MoE body, attention, loss and AdamW, each alone on one device, beside others' and bare GEMMs.

The MoE body, all that follows the router, takes tokens, expert ids and routing weights, and returns weighted sums.
Attention is that of packed documents. The loss takes hidden states and the head's weight, and returns a sum. These are
forward and backward. AdamW steps on the matrices of --layers layers with half of their experts, as on each of two GPUs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks.cells import SIZES, model_config
from benchmarks.measure import device_kernels, elapsed_ms, mark, summary, synchronize
from benchmarks.records import machine, parser, provenance, publish, quantile
from benchmarks.workload import max_over_mean
from lightning_ep import AdamW, ExpertParallel
from lightning_ep.ops.cross_entropy import linear_cross_entropy
from lightning_ep.ops.packed_attention import attend_documents, documents_mask
from lightning_ep.transformers_adapter import experts_modules

GPT_OSS = {  # experts with biases, interleaved and clamped; measured as a layer alone
    "gpt-oss-20b": {
        "hidden_size": 2880, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 2880,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201_088,
    },
    "gpt-oss-tiny": SIZES["tiny"],
}  # fmt: skip
WIDTHS = {**SIZES, **GPT_OSS}

Function = Callable[..., Any]
Inputs = list[tuple[Any, ...]]
Row = dict[str, str]

_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of an H200
_WINDOW = 4096  # tokens of a window of documents
_LOGIT_STD = 0.9  # of a router with weights of standard deviation 0.02 on normalised rows of width 2048
_CALL = "forward and backward"  # a column
_EXPONENT = 0.25  # of a skewed router: the most popular of 128 experts then gets about five times the mean, top-8


def main(arguments: list[str] | None = None) -> None:
    """Times one of the layers and prints the table."""
    made = parser("layers", __doc__, layers=4, sizes=sorted(WIDTHS))
    measures = {"moe": measure_moe, "attention": measure_attention, "loss": measure_loss, "adamw": measure_adamw}
    made.add_argument("layer", choices=list(measures))
    made.add_argument("--tokens", type=int, default=16_384)
    made.add_argument("--repeats", type=int, default=30)
    options = made.parse_args(arguments)
    device = torch.device(options.device)
    size = options.layers if options.layer == "adamw" else options.tokens
    found = measures[options.layer](options.sizes, size, device, options.repeats)
    unit = "layers" if options.layer == "adamw" else "tokens"
    title = f"{options.layer}, {size:,} {unit} of {options.sizes}"
    print(publish(options.json, {**provenance(), "machine": machine(device), "title": title, "rows": found}))
    if dist.is_initialized():
        dist.destroy_process_group()


def milliseconds(function: Function, inputs: Inputs, repeats: int) -> list[float]:
    """Of calls that take the inputs in turn, from the first launch to the end of the last kernel, with a cold L2 cache.

    A host that is too slow shows.
    """
    device = inputs[0][0].device
    flush = torch.empty(_FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    pairs = []
    for index in range(3 + repeats):  # the first ones compile, and make the state of optimizers
        flush.zero_()
        before = mark(device)
        function(*inputs[index % len(inputs)])
        pairs.append((before, mark(device)))
    synchronize(device)
    return [elapsed_ms(*pair) for pair in pairs[3:]]


def timed(function: Function, inputs: Inputs, repeats: int) -> Row:
    """Columns of a call: milliseconds (median, 10th and 90th percentile), and on CUDA its memory and a profile."""
    device = inputs[0][0].device
    try:
        times = milliseconds(function, inputs, repeats)
        row = {"ms": f"{statistics.median(times):.2f} ({quantile(times, 0.1):.2f} to {quantile(times, 0.9):.2f})"}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            size = sum(result.numel() * result.element_size() for result in function(*inputs[0]))
            most = torch.cuda.max_memory_allocated() - before - size
            row["GiB above inputs and gradients"] = f"{most / 2**30:.2f}"
        for _ in range(2 if device.type == "cuda" else 0):  # the first use of the profiler disturbs what it records
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                function(*inputs[0])
                synchronize(device)
            found = summary(device_kernels(profiled))
            row["GPU busy ms"] = f"{found['gpu_busy_ms']:.2f}"
            row["of it by kind of kernel"] = ", ".join(f"{name} {ms:.2f}" for name, ms in found["by_kind"].items())
        return row
    except Exception as error:  # a peer that breaks or runs out of memory is a result
        return {"ms": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}


def gradients(function: Function, parameters: Iterable[Tensor] = ()) -> Function:
    """Calls and differentiates by inputs and parameters; the last input is the gradient of the result, or None."""
    trained = list(parameters)

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        out = function(*inputs[:-1])
        return torch.autograd.grad(out, [x for x in (*inputs[:-1], *trained) if x.requires_grad], inputs[-1])

    return run


def rows(functions: dict[str, Function], inputs: Inputs, repeats: int) -> list[Row]:
    """A row for each function and its gradients."""
    return [{_CALL: name, **timed(gradients(function), inputs, repeats)} for name, function in functions.items()]


def random(device: torch.device, *shape: int, std: float = 1.0) -> Tensor:
    """Normal numbers of the dtype that is measured: bf16, and fp32 on a CPU."""
    return (std * torch.randn(shape, device=device)).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


# ---------------------------------------------------------------------- the MoE body


def measure_moe(sizes: str, tokens: int, device: torch.device, repeats: int) -> list[Row]:
    """One row per body and popularity of experts."""
    peer = "grouped_mm" if device.type == "cuda" else "eager"
    bodies = {
        "lightning_ep, ep=1": our_experts(sizes, device),
        f"lightning_ep, ep=1, transformers' {peer}": our_experts(sizes, device, peer),
        f"transformers, {peer}": transformers_experts(sizes, device, peer),
    }
    found = []
    for router in ("balanced", "skewed"):
        inputs = [moe_inputs(sizes, tokens, router, seed, device) for seed in range(3)]
        counts = torch.bincount(inputs[0][1].reshape(-1), minlength=WIDTHS[sizes]["num_experts"])
        how = {"router, hottest expert": f"{router}, {max_over_mean([counts]):.2f}"}
        for name, body in bodies.items():
            row = timed(gradients(body, body.parameters()), inputs, repeats)
            found.append({_CALL: name, **how, **row})
    alone = {_CALL: "the six grouped GEMMs alone", "router, hottest expert": "even"}
    return [*found, {**alone, **timed(*_gemms(sizes, tokens, device), repeats)}]


def our_experts(sizes: str, device: torch.device, implementation: str = "fused") -> nn.Module:
    """An experts module whose forward is the package's whole body, as the plan sets it up on an EP group of one."""
    if not dist.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (1,), mesh_dim_names=("ep",))
    style = ExpertParallel(experts_implementation=implementation)
    return parallelize_module(transformers_experts(sizes, device, "eager"), mesh, style)


def transformers_experts(sizes: str, device: torch.device, implementation: str) -> nn.Module:
    """transformers' own experts module with random weights."""
    if sizes in GPT_OSS:
        inner = GPT_OSS[sizes]["moe_intermediate_size"]
        config = AutoConfig.for_model("gpt_oss", **GPT_OSS[sizes], intermediate_size=inner, num_hidden_layers=1)
    else:
        config = model_config(sizes, layers=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation(implementation)
    (experts,) = experts_modules(model).values()
    torch.manual_seed(0)
    for name, param in experts.named_parameters():
        setattr(experts, name, nn.Parameter(random(device, *param.shape, std=0.02)))
    return experts


def moe_inputs(sizes: str, tokens: int, router: str, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Hidden states ``[T, H]``, ids and weights ``[T, K]``, and the gradient of the output ``[T, H]``."""
    torch.manual_seed(seed)
    experts, width = WIDTHS[sizes]["num_experts"], WIDTHS[sizes]["hidden_size"]
    logits_TE = _LOGIT_STD * torch.randn(tokens, experts)
    if router == "skewed":
        logits_TE -= _EXPONENT * (torch.randperm(experts) + 1).log()  # popularity falls with rank like Zipf's law
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(WIDTHS[sizes]["num_experts_per_tok"])
    hidden_TH, grad_TH = (random(device, tokens, width) for _ in range(2))
    weights_TK = (weights_TK / weights_TK.sum(-1, keepdim=True)).to(device, hidden_TH.dtype)
    return hidden_TH.requires_grad_(), ids_TK.to(device), weights_TK.requires_grad_(), grad_TH


def _gemms(sizes: str, tokens: int, device: torch.device) -> tuple[Function, Inputs]:
    """Forward, input-gradient and weight-gradient GEMMs of both projections on rows already sorted, even splits.

    Nothing that an MoE layer needs can be faster than these, unless it uses a better grouped GEMM.
    """
    widths = WIDTHS[sizes]
    width, inner, experts = widths["hidden_size"], widths["moe_intermediate_size"], widths["num_experts"]
    pairs = tokens * widths["num_experts_per_tok"] // experts * experts
    ends_E = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * (pairs // experts)
    up_EIH, down_EHI = (random(device, experts, *shape, std=0.02) for shape in ((2 * inner, width), (width, inner)))

    def body(x_PH: Tensor, act_PI: Tensor, grad_up_PI: Tensor, grad_PH: Tensor) -> tuple[Tensor, ...]:
        return (
            F.grouped_mm(x_PH, up_EIH.transpose(1, 2), offs=ends_E),
            F.grouped_mm(act_PI, down_EHI.transpose(1, 2), offs=ends_E),
            F.grouped_mm(grad_PH, down_EHI, offs=ends_E),
            F.grouped_mm(grad_PH.t(), act_PI, offs=ends_E),
            F.grouped_mm(grad_up_PI, up_EIH, offs=ends_E),
            F.grouped_mm(grad_up_PI.t(), x_PH, offs=ends_E),
        )

    columns = (width, inner, 2 * inner, width)
    return body, [tuple(random(device, pairs, column) for column in columns) for _ in range(2)]


# ---------------------------------------------------------------------- attention


def measure_attention(sizes: str, tokens: int, device: torch.device, repeats: int) -> list[Row]:
    """Windows of documents of about 600 tokens: one row per way to keep them apart, and without doing so."""
    widths, length = WIDTHS[sizes], min(_WINDOW, tokens)
    heads, kv_heads = widths["num_attention_heads"], widths["num_key_value_heads"]
    torch.manual_seed(0)
    shapes = [(tokens // length, count, length, widths["head_dim"]) for count in (heads, kv_heads, kv_heads)]
    inputs: Inputs = [tuple(random(device, *shape).requires_grad_() for shape in shapes) for _ in range(3)]
    inputs = [(*qkv, random(device, tokens // length, length, heads, widths["head_dim"])) for qkv in inputs]
    ends = range(length, tokens + 1, length)
    cuts = {int(cut) for cut in torch.randint(1, tokens, (tokens // 600,))}
    packed, whole = (torch.tensor(sorted({0, *ends, *more}), dtype=torch.int32) for more in (cuts, ()))
    longest, packed, whole = int(packed.diff().max()), packed.to(device), whole.to(device)
    mask = documents_mask(packed, tokens // length, length, None)
    ways: dict[str, Function] = {"sdpa, a mask of documents": functools.partial(_sdpa, mask)}
    if device.type == "cuda":
        ways["varlen, documents"] = lambda q, k, v: attend_documents(q, k, v, packed, longest, None, None)
        ways["varlen, whole windows"] = lambda q, k, v: attend_documents(q, k, v, whole, length, None, None)
    ways["sdpa, whole windows"] = functools.partial(_sdpa, None)
    return rows(ways, inputs, repeats)


def _sdpa(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    module: Any = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
    return sdpa_attention_forward(module, query, key, value, mask)[0]


# ---------------------------------------------------------------------- the loss


def measure_loss(sizes: str, tokens: int, device: torch.device, repeats: int) -> list[Row]:
    """One row per implementation that is installed."""
    torch.manual_seed(0)
    hidden, vocab = WIDTHS[sizes]["hidden_size"], WIDTHS[sizes]["vocab_size"]
    weight_VH = random(device, vocab, hidden, std=0.02).requires_grad_()
    inputs: Inputs = []
    for _ in range(2):
        targets_T = torch.randint(0, vocab, (tokens,), device=device)
        inputs.append((random(device, tokens, hidden).requires_grad_(), weight_VH, targets_T, None))
    return rows(losses(), inputs, repeats)


def losses() -> dict[str, Function]:
    """By name what is here: hidden ``[T, H]``, weight ``[V, H]`` and targets ``[T]`` to the sum of the losses."""

    def plain(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:  # as a transformers model does
        return F.cross_entropy(F.linear(hidden_TH, weight_VH).float(), targets_T, reduction="sum")

    found: dict[str, Function] = {"plain": plain, "lightning_ep": linear_cross_entropy}
    with contextlib.suppress(ImportError):
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda hidden, weight, targets: liger(weight, hidden, targets)
    return found


# ---------------------------------------------------------------------- AdamW


def measure_adamw(sizes: str, layers: int, device: torch.device, repeats: int) -> list[Row]:
    """One row per optimizer and dtype; bytes are those of gradients and state, and what a step reads and writes."""
    widths, found = SIZES[sizes], []
    hidden, inner, experts = widths["hidden_size"], widths["moe_intermediate_size"], widths["num_experts"] // 2
    heads = widths["head_dim"] * (widths["num_attention_heads"] + widths["num_key_value_heads"])
    shapes = layers * [(experts, 2 * inner, hidden), (experts, hidden, inner), (heads, hidden), (hidden,)]
    for name, dtype, held, moved, build in optimizers():
        params = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = build(params)
        ms = statistics.median(milliseconds(lambda _, step=optimizer.step: step(), [(params[0],)], repeats))
        count = sum(param.numel() for param in params)
        speed = {"ms per 1e9 parameters": f"{ms / count * 1e9:.2f}", "TB/s": f"{moved * count / ms / 1e9:.2f}"}
        found.append({"optimizer": name, **speed, "bytes per parameter, gradients too": str(held)})
        del params, param, optimizer
        gc.collect()
    return found


def optimizers() -> Iterator[tuple[str, torch.dtype, int, int, Callable[[list[Tensor]], torch.optim.Optimizer]]]:
    """Name, dtype of weights and gradients, bytes held and bytes moved per parameter, and the optimizer.

    torchao's ``bf16_stochastic_round`` rounds weights so and moments to the nearest, or holds these in 8 bits.
    """
    fp32, bf16 = torch.float32, torch.bfloat16
    yield "torch, fused, fp32", fp32, 16, 28, functools.partial(torch.optim.AdamW, fused=True)
    yield "lightning_ep, fp32", fp32, 16, 28, AdamW
    yield "torch, fused, bf16 to the nearest", bf16, 8, 14, functools.partial(torch.optim.AdamW, fused=True)
    yield "lightning_ep, bf16 to the nearest", bf16, 8, 14, AdamW
    yield "lightning_ep, bf16 stochastically", bf16, 8, 14, functools.partial(AdamW, stochastic_rounding=True)
    if importlib.util.find_spec("torchao") is not None:
        from torchao.optim import AdamW8bit, _AdamW

        rounds = {"lr": 1e-3, "bf16_stochastic_round": True}
        yield "torchao, bf16, weights stochastically", bf16, 8, 14, functools.partial(_AdamW, **rounds)
        yield "torchao, bf16, moments in 8 bits", bf16, 6, 10, functools.partial(AdamW8bit, **rounds)


if __name__ == "__main__":
    main()
