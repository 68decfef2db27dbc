"""activation_checkpointing: the gradients of 'none' to the last bit, routing once, and no more sent than said."""

from __future__ import annotations

import functools
import gc
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lightning_ep import ParallelLayout, expert_plan, parallelize
from lightning_ep.ops import fused_experts, low_rank
from lightning_ep.parallelize import check_recompute
from tests.moe.test_families import FAMILIES, SIZES
from tests.ranks import assert_ranks_agree, device, run_ranks
from tests.reference import batches, relative_error
from tests.rows import refused, whole

MODES = ("none", "selective", "full")
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**FAMILIES["qwen3_moe"], "norm_topk_prob": True},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 16},  # saves tensors after its experts
    "deepseek_v3": {  # a router in fp32, a dense layer, shared experts
        "n_routed_experts": 8, "num_local_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": FAMILIES["gpt_oss"],  # experts with biases
    "olmoe": {"num_experts": 8, "hidden_act": "gelu"},  # experts that transformers runs
}  # fmt: skip
MOE_LAYERS = {"qwen3_moe": 2, "qwen2_moe": 2, "deepseek_v3": 1, "gpt_oss": 2, "olmoe": 2}
BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
Change = Callable[[PreTrainedModel], object]


def model_of(family: str, change: Change | None = None, **overrides: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**SIZES, **MODELS[family], **overrides})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, param in model.named_parameters():
                if "norm" not in name:
                    param.normal_(std=0.1)
    if change is not None:
        change(model)
    return model


class Counts(Counter[str]):
    """What happened, by name."""

    def function(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self[name] += 1
            return function(*args, **kwargs)

        return counted


@contextmanager
def counting(model: PreTrainedModel) -> Iterator[Counts]:
    """Counts exchanges, grouped GEMMs of the forward kind, and calls of routers, experts and attention."""
    counts, hooks = Counts(), []
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if kind in ("gate", "router", "experts", "self_attn"):
            called = counts.function(lambda *args: None, kind.replace("router", "gate"))
            hooks.append(module.register_forward_hook(called))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", counts.function(dist.all_to_all_single, "exchanges"))
        patch.setattr(low_rank, "grouped_mm", counts.function(low_rank.grouped_mm, "gemms"))
        yield counts
    for hook in hooks:
        hook.remove()


def _train(
    family: str, ep: int, mode: str, change: Change | None = None, policy: MixedPrecisionPolicy | None = None,
    compile: bool = False, **overrides: Any,
) -> tuple[dict[str, Tensor | None], list[Counts]]:  # fmt: skip
    """Gradients of two accumulated batches of unlike length; what happened in the second forward and the backward."""
    model, world = model_of(family, change, **overrides), dist.get_world_size()
    layout = ParallelLayout.resolve(ep, "auto", world, world)
    parallelize(model, layout, device(), mp_policy=policy, compile=compile, activation_checkpointing=mode)
    model.train()
    torch.manual_seed(dist.get_rank())  # of dropout
    for length in (12, 8):
        batch = {k: v.to(device()) for k, v in batches(world, 2, length)[dist.get_rank()].items()}
        with counting(model) as forward:
            loss = model(**batch).loss
        with counting(model) as backward:
            loss.backward()
    grads = {name: None if p.grad is None else whole(p.grad) for name, p in model.named_parameters()}
    return grads, [forward, backward]


def _different(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> list[str]:
    assert any(grad is not None and grad.any() for grad in expected.values())
    return [
        name
        for name, grad in expected.items()
        if (found[name] is None) != (grad is None) or (grad is not None and not torch.equal(found[name], grad))
    ]


def _compare(ep: int) -> list[str]:
    wrong = []
    for family, layers in MOE_LAYERS.items():
        expected = None
        for mode in MODES:
            grads, (forward, backward) = _train(family, ep, mode)
            expected = expected or grads
            wrong += [f"{family}, {mode}: gradient of {name}" for name in _different(grads, expected)]
            full, fused = mode == "full", family != "olmoe"
            travels, runs = layers * (ep > 1), layers * fused
            # Counts, rows with their ids and weights, and outputs travel; the up and the down projection run.
            calls = Counts(gate=layers, experts=layers, self_attn=2, exchanges=3 * travels, gemms=2 * runs)
            # Gradients of outputs, of rows and of weights, and the rows again; of the activation, of the rows, and up.
            again = Counts(self_attn=2 * (mode != "none"), exchanges=(3 + full) * travels, gemms=(2 + full) * runs)
            wanted = [calls, again]
            wrong += [
                f"{family}, {mode}, {what}: {dict(+f)} and not {dict(+w)}"
                for f, w, what in zip((forward, backward), wanted, ("forward", "backward"), strict=True)
                if +f != +w
            ]
    return wrong


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_gradients_are_equal_and_nothing_runs_twice_that_need_not(world: int, ep: int) -> None:
    assert_ranks_agree(world, _compare, ep)


def _compiled(family: str, ep: int, modes: tuple[str, ...], layers: int, backend: str) -> list[str]:
    wrong = []
    expected, _ = _train(family, ep, "none", num_hidden_layers=layers)
    for mode in modes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
            wrong += [f"{family}, {mode}: {what}" for what in _compiled_run(family, ep, mode, layers, expected)]
    return wrong


def _compiled_run(family: str, ep: int, mode: str, layers: int, expected: dict[str, Tensor | None]) -> Iterator[str]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, world = model_of(family, num_hidden_layers=layers), dist.get_world_size()
    layout = ParallelLayout.resolve(ep, "auto", world, world)
    parallelize(model, layout, device(), compile=True, activation_checkpointing=mode)
    frames, called = torch._dynamo.utils.counters["frames"], Counts()
    for name, module in model.named_modules():
        if name.endswith((".gate", ".experts")) and mode != "none":  # once and for all: Dynamo guards on hooks
            module.register_forward_hook(called.function(lambda *args: None, name.rpartition(".")[2]))
    exchanges = Counts()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", exchanges.function(dist.all_to_all_single, "exchanges"))
        for step, length in enumerate((12, 8, 20, 12, 16)):
            if step == 2:
                compiled = frames["total"]
                yield from (f"gradient of {name}" for name in _far(model, expected))
            batch = {k: v.to(device()) for k, v in batches(world, 2, length)[dist.get_rank()].items()}
            model(**batch).loss.backward()
    if frames["ok"] != frames["total"] or not frames["ok"]:
        yield f"of {frames['total']} frames {frames['ok']} compiled"
    if frames["total"] != compiled:
        yield f"compiled {frames['total'] - compiled} frames again for other numbers of tokens"
    moe_layers = MOE_LAYERS[family] - 2 + layers
    if exchanges["exchanges"] != (ep > 1) * 5 * moe_layers * (6 + (mode == "full")):
        yield f"{exchanges['exchanges']} exchanges"
    if mode != "none" and called != {"gate": 5 * moe_layers, "experts": 5 * moe_layers}:
        yield f"{dict(called)} calls"


def _far(model: PreTrainedModel, expected: dict[str, Tensor | None]) -> list[str]:
    return [n for n, p in model.named_parameters() if not relative_error(whole(p.grad), expected[n]) <= 1e-5]


@pytest.mark.parametrize(
    ("mode", "backend"),
    [
        ("full", "eager"),  # graphs are Dynamo's; tests/transformers_adapter/test_document_bounds.py has AOTAutograd's
        pytest.param("full", "aot_eager", marks=pytest.mark.slow),
        pytest.param("selective", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_recompute_in_graphs_that_serve_any_number_of_tokens(mode: str, backend: str) -> None:
    assert_ranks_agree(2, _compiled, "qwen2_moe", 2, (mode,), 1, backend, timeout=110)


@pytest.mark.slow
@pytest.mark.timeout(330)  # inductor compiles for a minute, and longer beside other work
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(("world", "ep"), [(2, 2), (2, 1)])
def test_layers_compiled_by_inductor_recompute(family: str, world: int, ep: int) -> None:
    assert_ranks_agree(world, _compiled, family, ep, MODES[1:], 2, "inductor", timeout=300)


def _freeze(*words: str) -> Change:
    def change(model: PreTrainedModel) -> None:
        for name, param in model.named_parameters():
            param.requires_grad_(not any(word in name for word in words))

    return change


def _hook(function: Callable[[Tensor], Tensor]) -> Change:
    """Lets every MoE block return a function of its output."""

    def change(model: PreTrainedModel) -> None:
        for name, module in model.named_modules():
            if name.endswith("mlp") and hasattr(module, "experts"):
                module.register_forward_hook(lambda module, args, out: function(out))

    return change


def _draw(*_: Any) -> None:
    torch.rand(3, device=device())


def _stochastic(model: PreTrainedModel) -> None:
    """Routers that draw random numbers, and layers that draw more of them after their routing."""
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(_draw)
    _hook(lambda out: torch.nn.functional.dropout(out, 0.3) * out.sigmoid())(model)


def _special_cases(family: str) -> list[str]:
    cases: dict[str, dict[str, Any]] = {
        "frozen experts": {"change": _freeze("experts")},
        "frozen routers": {"change": _freeze("gate.")},
        "inputs without gradients": {"change": _freeze("embed_tokens", "layers.0")},
        "all frozen but the head": {"change": _freeze("embed_tokens", "layers", "norm")},
        "experts alone": {"change": _freeze("embed_tokens", "attn", "norm", "gate.", "lm_head")},
        "dropout": {"attention_dropout": 0.3},
        "routers that draw": {"change": _stochastic},
        "loss on router logits": {"output_router_logits": True},
        "bf16": {"policy": BF16},
        "layers that save the experts' output": {"change": _hook(lambda out: out * out.sigmoid())},
        "no early stop": {},
    }
    wrong = []
    for case, arguments in cases.items():
        early_stop = case != "no early stop"
        expected, _ = _train(family, 2, "none", **arguments)
        for mode in MODES[1:]:
            with set_checkpoint_early_stop(early_stop):
                grads, _ = _train(family, 2, mode, **arguments)
            wrong += [f"{case}, {mode}: gradient of {name}" for name in _different(grads, expected)]
    return wrong


@pytest.mark.parametrize("family", [pytest.param("qwen3_moe", marks=pytest.mark.slow), "deepseek_v3"])
def test_frozen_parts_dropout_router_losses_and_bf16(family: str) -> None:
    assert_ranks_agree(2, _special_cases, family)


def _modified_in_place() -> None:
    for mode in MODES[1:]:
        with refused("modified in place", "'none'"):
            _train("qwen3_moe", 1, mode, _hook(lambda out: out.mul_(2).sigmoid()))
        with refused("modified its input in place", "'none'"):
            _train("qwen3_moe", 1, mode, _jitter)


def _scale_input(module: nn.Module, args: Any) -> None:
    args[0].mul_(1.01)


def _jitter(model: PreTrainedModel) -> None:
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_pre_hook(_scale_input)


def test_what_was_modified_in_place_is_not_used_again() -> None:
    run_ranks(1, _modified_in_place)


# ---------------------------------------------------------------------- memory


def _out_of_memory(mode: str, part: str) -> str:
    """What is said when ``part`` of the last layer runs out of memory in backward."""
    model = model_of("qwen3_moe")
    parallelize(model, ParallelLayout(1), device(), activation_checkpointing=mode)
    loss = model(**{k: v.to(device()) for k, v in batches(1, 2)[0].items()}).loss

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.MonkeyPatch.context() as patch:
        if part == "attention":
            model.model.layers[-1].self_attn.register_forward_pre_hook(fail)
        else:
            patch.setattr(fused_experts, "activate_backward", fail)
        with pytest.raises(torch.OutOfMemoryError) as error:
            loss.backward()
    return str(error.value)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_out_of_memory_in_backward_names_what_ran(mode: str) -> None:
    (attention,), (experts,) = (run_ranks(1, _out_of_memory, mode, part) for part in ("attention", "experts"))
    assert re.match(r"Out of memory while a decoder layer ran again .* CUDA out of memory\.$", attention), attention
    assert re.match(r"Out of memory in model\.layers\.1\.mlp\.experts: .* CUDA out of memory\.$", experts), experts


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, DTensor)


class Allocations(TorchDispatchMode):
    """The memory that operators have made, and what of it is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        for tensor in tree_leaves(out):
            if _is_plain(tensor) and (storage := tensor.untyped_storage())._cdata not in known:
                self.made.append((StorageWeakRef(storage), storage.nbytes(), tuple(tensor.shape)))
        return out

    def held(self) -> list[tuple[int, tuple[int, ...]]]:
        return [made[1:] for made in self.made if not made[0].expired()]


def _held(family: str, mode: str, layers: int) -> tuple[list[Any], list[Any]]:
    model = model_of(family, num_hidden_layers=layers)
    parallelize(model, ParallelLayout(1), device(), activation_checkpointing=mode)
    batch = {k: v.to(device()) for k, v in batches(1, 4, 16)[0].items()}
    model(**batch).loss.backward()  # what FSDP makes once is made
    gc.collect()
    gc.disable()  # a circle of references would keep activations until it runs
    with Allocations() as allocations:
        loss = model(**batch).loss
    between = allocations.held()
    loss.backward()
    del loss
    with allocations:
        model(**batch)  # a graph that nobody runs backward through
    return between, allocations.held()


def _bytes_per_token_and_layer(family: str) -> dict[str, tuple[float, list[Any]]]:
    found = {}
    for mode in MODES:
        (two, after), (three, _) = (_held(family, mode, layers) for layers in (2, 3))
        one_layer = Counter(three)
        one_layer.subtract(two)
        large = [shape for (_, shape), count in (+one_layer).items() for _ in range(count) if len(shape) > 0]
        assert not after, f"{mode}: held without a graph: {after}"
        found[mode] = (sum(size for size, _ in three) - sum(size for size, _ in two)) / 64, sorted(large)
    return found


@pytest.mark.parametrize(("family", "with_outputs"), [("qwen3_moe", False), ("deepseek_v3", True)])
def test_full_keeps_inputs_and_routing_until_backward_and_nothing_after(family: str, with_outputs: bool) -> None:
    found = run_ranks(1, _bytes_per_token_and_layer, family)[0]
    tokens, hidden, experts, top_k = 64, 32, 8, 2
    # Of the size of hidden states: the layer's input, and what the experts returned where the layer saves after them.
    large = [shape for shape in found["full"][1] if torch.Size(shape).numel() >= tokens * hidden]
    assert large == [(4, 16, hidden)] + [(tokens, hidden)] * with_outputs
    routing = 4 * (2 * experts + 3 * top_k + 1) + 8 * top_k  # logits, scores, weights in three states, sums; ids
    routing += 4 * (2 * top_k + experts / tokens)  # the order of pairs by expert, and where each expert's end
    assert found["full"][0] <= 4 * hidden * (1 + with_outputs) + routing
    # Besides, one row and 2 I numbers per expert of a token; selective recomputes the rest of the layer.
    assert found["selective"][0] - found["full"][0] >= 4 * (2 * 16 * top_k)
    assert found["none"][0] - found["selective"][0] >= 4 * (4 * hidden)


def _leaks() -> dict[str, list[Any]]:
    return {mode: _held("olmoe", mode, 1)[1] for mode in MODES}


def test_graphs_of_experts_that_transformers_runs_are_freed_too() -> None:
    assert run_ranks(1, _leaks) == [{mode: [] for mode in MODES}]


def test_families_without_a_declared_router_are_refused_before_anything_is_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of("qwen3_moe")
    monkeypatch.setattr(type(model), "_can_record_outputs", {})
    monkeypatch.setattr(type(model.model), "_can_record_outputs", {})
    for layer in model.model.layers:
        layer.mlp.gate = nn.Sequential(layer.mlp.gate)  # nor is it known by its weight
    with pytest.raises(ValueError, match=r"'full' cannot serve model\.layers\.0\.mlp\.experts.*declares no router"):
        check_recompute(model, expert_plan(model), "full")


def _scaled(world: int) -> list[str]:
    def halved(model: PreTrainedModel) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))

    ids = batches(1, 1, 9)[0]["input_ids"].to(device())
    found = []
    for mode in MODES:
        model = model_of("qwen3_moe", halved)
        layout = ParallelLayout.resolve(world, "auto", world, world)
        parallelize(model, layout, device(), activation_checkpointing=mode)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: whole(param.grad) for name, param in model.named_parameters() if param.grad is not None})
    plain, *others = found
    return [
        f"{mode}, {name}"
        for mode, grads in zip(MODES[1:], others, strict=True)
        for name, grad in grads.items()
        if not relative_error(grad, plain[name]) < 1e-5
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_what_a_hook_makes_of_the_experts_input_is_what_backward_has(world: int) -> None:
    assert_ranks_agree(world, _scaled, world)
