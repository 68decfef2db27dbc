"""Experts that no model declares: plans of one's own for plain PyTorch and for families of transformers."""

from __future__ import annotations

import copy
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_ep import AdamW, ExpertParallelStrategy, ParallelLayout, expert_plan, parallelize
from lightning_ep.layers.wrap import check_recompute
from lightning_ep.moe.experts import is_parallel_experts
from lightning_ep.moe.own_plan import resolve_plan
from lightning_ep.parallelize import check
from tests.ranks import assert_ranks_agree, device
from tests.reference import VOCAB, relative_error, tiny_model
from tests.tiny import quiet

PAGE = Path(__file__).parents[2] / "docs" / "extend" / "plans.md"
PLAN: dict[str, Any] = {"model.layers.*.moe.experts": "experts"}


def _page() -> dict[str, Any]:
    """What the code of the page defines."""
    decoder, code, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    exec(decoder, names)
    printed = "from decoder import Decoder\n"
    assert printed in code
    exec(code.replace(printed, ""), names)
    return names


def _decoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = _page()["Decoder"]()
        return model


def _ids(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(seed))


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def _differences(found: nn.Module, expected: nn.Module, gradients: bool) -> list[str]:
    wrong = []
    for (name, param), reference in zip(found.named_parameters(), expected.parameters(), strict=True):
        one, other = (param.grad, reference.grad) if gradients else (param.detach(), reference.detach())
        if not (error := relative_error(one.full_tensor(), other)) <= 1e-5:  # type: ignore[union-attr, arg-type]
            wrong.append(f"{name}: {error:.1e}")
    return wrong


def _fits(root: Path) -> list[str]:
    rank, world, page = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _page()
    plain = _decoder()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        sum(_loss(plain, _ids(world * step + other)) / world for other in range(world)).backward()  # type: ignore[union-attr]
        optimizer.step()
    module = page["Module"]()
    module.model = _decoder()
    data = DataLoader([_ids(world * step + rank) for step in range(3)], batch_size=None)
    trainer = quiet(root, strategy=page["strategy"], max_steps=3, use_distributed_sampler=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(root / "saved")
    wrong = _differences(module.model, plain, gradients=False)
    spread = [layer.moe.experts for layer in module.model.layers]
    if not all(map(is_parallel_experts, spread)) or spread[0].up.to_local().shape[0] != 4:
        wrong.append("experts are not spread")
    again = page["Module"]()
    strategy = ExpertParallelStrategy(plan=PLAN)
    quiet(root, strategy=strategy, max_steps=3).fit(again, data, ckpt_path=root / "saved", weights_only=False)
    return [*wrong, *(f"resumed: {found}" for found in _differences(again.model, plain, gradients=False))]


def test_the_plain_model_of_the_page_trains_and_resumes_like_one_process(tmp_path: Path) -> None:
    assert_ranks_agree(2, _fits, tmp_path, init_process_group=False)


def _gradients(ep: int, mode: Any, compile: bool) -> list[str]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    plain, sharded = _decoder(), _decoder()
    sum(_loss(plain, _ids(other)) for other in range(world)).backward()  # type: ignore[union-attr]
    layout = ParallelLayout.resolve(ep, "auto", world, world)
    plan: dict[str, Any] = {"layers.*.moe.experts": "experts"}
    parallelize(sharded, layout, device(), plan=plan, activation_checkpointing=mode, compile=compile)
    _loss(sharded, _ids(rank).to(device())).backward()
    return _differences(sharded, plain, gradients=True)


@pytest.mark.parametrize(
    ("world", "ep", "mode", "compile"),
    [
        (2, 1, "full", False),
        pytest.param(2, 2, "selective", True, marks=pytest.mark.slow),
        pytest.param(4, 2, "none", False, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_plain_models_equal_one_process(world: int, ep: int, mode: str, compile: bool) -> None:
    assert_ranks_agree(world, _gradients, ep, mode, compile)


class _Whole(nn.Module):
    """Experts as one product each, of whose gradients none has its parameter's strides."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        size, width = 32, 64  # of the page's model
        inner, outer = (8, size, width), (8, width, size)
        self.up = nn.Parameter(torch.randn(outer if transposed else inner) * size**-0.5)
        self.down = nn.Parameter(torch.randn(inner if transposed else outer) * width**-0.5)

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        if self.transposed:
            every = hidden_TH.expand(len(self.up), -1, -1)
            out_ETH = F.silu(every @ self.up.transpose(1, 2)) @ self.down.transpose(1, 2)
        else:
            out_ETH = torch.einsum("etd,edh->eth", F.silu(torch.einsum("th,ehd->etd", hidden_TH, self.up)), self.down)
        chosen_TKH = out_ETH.transpose(0, 1).gather(1, ids_TK[..., None].expand(-1, -1, hidden_TH.shape[-1]))
        return (chosen_TKH * weights_TK[..., None]).sum(1)


def _adamw(transposed: bool, optimizer: Any) -> list[str]:
    rank, world = dist.get_rank(), dist.get_world_size()
    plain = _decoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in plain.layers:
            layer.moe.experts = _Whole(transposed)
    model = copy.deepcopy(plain)
    layout, plan = ParallelLayout(world, ep=world), {"layers.*.moe.experts": "experts"}
    parallelize(model, layout, device(), plan=plan)
    with pytest.raises(ValueError, match="is spread over ranks already: `parallelize` is called once"):
        parallelize(model, layout, device(), plan=plan)
    # eps: without it a gradient of 1e-12 would be a whole step, in either direction.
    ours, reference = optimizer(model.parameters()), torch.optim.AdamW(plain.parameters(), lr=1e-2, eps=1e-4)
    wrong = []
    for step in range(3):
        batches = [_ids(world * step + other) for other in range(world)]
        (_loss(model, batches[rank].to(device())) / world).backward()
        sum(_loss(plain, ids) / world for ids in batches).backward()  # type: ignore[union-attr]
        for name, param in model.named_parameters():
            one, other = param.to_local(), param.grad.to_local()  # type: ignore[attr-defined]
            if one.stride() != other.stride():
                wrong.append(f"{name}: {one.stride()}, its gradient {other.stride()}")
        for one in (ours, reference):
            one.step()
            one.zero_grad()
    return [*wrong, *(one for one in _differences(model, plain, gradients=False) if "experts" in one)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("optimizer", [AdamW, partial(torch.optim.AdamW, fused=True)], ids=["ours", "torch's"])
def test_fused_optimizers_step_experts_whose_kernels_transpose(transposed: bool, optimizer: Any) -> None:
    assert_ranks_agree(2, _adamw, transposed, partial(optimizer, lr=1e-2, eps=1e-4))


class _Told(_Whole):
    """Experts that do more than add up, or are called otherwise than they say."""

    def __init__(self, how: str) -> None:
        super().__init__(transposed=False)
        self.how = how
        self.count = 8  # under a name that says nothing of experts
        self.dropout = nn.Dropout(0.5 if how == "dropout" else 0.0)

    def forward(self, hidden_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Any:
        if self.how == "counted":
            return sum(self.up[expert].sum() * hidden_TH for expert in range(self.count))
        if self.how == "normalised":
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        out_TH = self.dropout(super().forward(hidden_TH, ids_TK, weights_TK))
        if self.how == "residual":
            return out_TH + hidden_TH
        if self.how == "norm":
            return F.layer_norm(out_TH, out_TH.shape[-1:])
        return (out_TH, ids_TK) if self.how == "tuple" else out_TH


class _Calls(nn.Module):
    """The page's MoE layer, with another call of its experts."""

    def __init__(self, moe: Any, how: str) -> None:
        super().__init__()
        self.gate, self.experts, self.how = moe.gate, _Told(how), how

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.flatten(0, 1)
        weights_TK, ids_TK = self.gate(x_TH).softmax(-1).topk(2)
        if self.how == "order":
            return self.experts(x_TH, weights_TK, ids_TK).view_as(x_BSH)
        if self.how == "dropped":
            ids_TK[3, 1] = -1
        if self.how == "beyond":
            ids_TK[3, 1] = 8
        if self.how == "batch":
            return self.experts(x_BSH, ids_TK, weights_TK)
        return self.experts(x_TH, weights_TK=weights_TK, ids_TK=ids_TK).view_as(x_BSH)


_REFUSALS = {
    "normalised": r"experts of layers.0.moe.experts do not add up: two of a token .*Normalise weights where",
    "residual": "do not add up: .*a residual, a norm, a shared expert",
    "norm": "do not add up",
    "tuple": r"return tuple for hidden states \(8, 32\)",
    "order": r"are called with \(22, 32\) of torch.float32, \(22, 2\) of torch.float32, .* in this order",
    "batch": r"are called with \(2, 11, 32\) .*take hidden states \[tokens, size\]",
    "dropped": "are called with ids from -1 to 7, and there are experts 0 to 7. .* any id with a weight of 0",
    "beyond": "are called with ids from 0 to 8, and there are experts 0 to 7",
    "counted": r"index \d is out of bounds .*experts of layers.0.moe.experts were called for the \d of them",
    "keywords": "",
    "dropout": "",
}


def _told(ep: int) -> list[str]:
    wrong = []
    for how, says in _REFUSALS.items():
        if how == "counted" and ep == 1:  # all are here
            continue
        model = _decoder()
        for layer in model.layers:
            layer.moe = _Calls(layer.moe, how)
        layout = ParallelLayout(2, ep=ep, fsdp=2 // ep)
        parallelize(model, layout, device(), plan={"layers.*.moe.experts": "experts"})
        said = ""
        try:
            _loss(model, _ids(dist.get_rank()).to(device())).backward()
        except (ValueError, IndexError) as error:
            said = str(error)
        if bool(said) != bool(says) or not re.search(says, said):
            wrong.append(f"{how}: {said}")
        if not all(module.training for module in model.modules()):
            wrong.append(f"{how}: what looked has left modules in evaluation")
    return wrong


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_that_do_not_add_up_or_are_called_otherwise_are_refused(ep: int) -> None:
    """They trained silently wrong, at ep=1 as well, since rows are one expert each there too."""
    assert_ranks_agree(2, _told, ep)


def test_buffers_of_a_row_per_expert_are_refused() -> None:
    model = _decoder()
    model.layers[1].moe.experts.register_buffer("scale", torch.ones(8))
    with pytest.raises(
        ValueError, match=r"layers.1.moe.experts.scale of shape \(8,\) is a buffer with a row per expert"
    ):
        check(model, ParallelLayout(2, ep=2), resolve_plan(model, {"layers.*.moe.experts": "experts"}))


def test_a_pattern_that_matches_nothing_is_refused_with_what_is_near() -> None:
    with pytest.raises(ValueError, match=r"'model.layer.\*.moe.experts' matches no .*mean layers.\*.moe.experts"):
        resolve_plan(_decoder(), {"model.layer.*.moe.experts": "experts"})
    with pytest.raises(ValueError, match=r"may have experts in front: layers.\*.moe.experts\."):
        resolve_plan(_decoder(), {"transformer.h": "experts"})


def test_a_strategy_says_so_once_the_model_is_there(tmp_path: Path) -> None:
    module = _page()["Module"]()
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(plan={"layers.*.moe": "experts"}), max_steps=1)
    with pytest.raises(ValueError, match=r"'layers.\*.moe' matches no module of Module .*model.layers.\*.moe"):
        trainer.fit(module, DataLoader([_ids(0)], batch_size=None))


def test_other_styles_and_kernels_beside_styles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the plan has 'expert' for 'a.b', and a style is 'experts'"):
        quiet(tmp_path, strategy=ExpertParallelStrategy(plan={"a.b": "expert"}))


class _Swapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x


class _OneByOne(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Any:
        return self.experts(x)


@pytest.mark.parametrize(
    ("experts", "what"),
    [
        (nn.ModuleList(nn.Linear(4, 4) for _ in range(8)), "Experts that are modules one by one"),
        (_Swapped(), r"cannot be called as experts are: forward\(hidden \[tokens, size\], ids"),
    ],
)
def test_what_cannot_be_spread_is_refused_with_what_to_do(experts: nn.Module, what: str) -> None:
    model = _OneByOne(experts)
    with pytest.raises(ValueError, match=what):
        check(model, ParallelLayout(2, ep=2), resolve_plan(model, {"experts": "experts"}))


def test_experts_without_a_module_around_them_are_refused() -> None:
    module = L.LightningModule()
    module.experts = _Swapped()
    with pytest.raises(ValueError, match="are in no module that is called in forward"):
        resolve_plan(module, {"experts": "experts"}, is_called=False)


def test_tensor_parallelism_of_plain_models_is_refused() -> None:
    model = _decoder()
    with pytest.raises(ValueError, match=r"the model \(Decoder\) is no transformers model.* Use tp=1 and cp=1"):
        check(model, ParallelLayout(2, ep=2, tp=2), resolve_plan(model, {"layers.*.moe.experts": "experts"}))


def test_a_family_without_a_plan_names_this_way() -> None:
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=1, hidden_size=32, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"Llama4ForCausalLM .* name them: plan=\{\"model.layers.\*.mlp.experts\""):
        expert_plan(model)
    with pytest.raises(ValueError, match=r"Llama4TextExperts\) cannot be called as experts are"):
        check(model, ParallelLayout(2, ep=2), resolve_plan(model, {"model.layers.*.feed_forward.experts": "experts"}))


def _undeclared() -> list[str]:
    rank = torch.distributed.get_rank()
    plain, sharded = tiny_model(), tiny_model()
    for model in (plain, sharded):
        model.config.base_model_ep_plan = model._ep_plan = None
    sum(plain(input_ids=_ids(other), labels=_ids(other)).loss for other in range(2)).backward()
    layout = ParallelLayout.resolve(2, 1, 2, 2)
    plan: Any = {"layers.*.mlp.experts": "experts", "model.layers.*.mlp.experts": "experts"}
    try:
        parallelize(copy.deepcopy(sharded), layout, device(), plan=plan)
        return ["the first pattern matches nothing, and was accepted"]
    except ValueError:
        del plan["layers.*.mlp.experts"]
    parallelize(sharded, layout, device(), plan=plan, activation_checkpointing="full")
    ids = _ids(rank).to(device())
    sharded(input_ids=ids, labels=ids).loss.backward()
    return _differences(sharded, plain, gradients=True)


def test_a_transformers_model_that_declares_nothing_trains_by_a_plan() -> None:
    assert_ranks_agree(2, _undeclared)


class _Stages(nn.Module):
    """Lists in a list, of which none is called."""

    def __init__(self) -> None:
        super().__init__()
        page = _decoder()
        self.embed, self.head = page.embed, page.head
        first, second = (nn.ModuleDict({"norm": layer.norms[0], "moe": layer.moe}) for layer in page.layers)
        self.stages: Any = nn.ModuleList([nn.ModuleList([first]), nn.ModuleList([second])])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for (block,) in self.stages:
            x = x + block["moe"](block["norm"](x))
        return self.head(x)


def _gradients_of_stages(mode: Any) -> list[str]:
    rank, world, plain = dist.get_rank(), dist.get_world_size(), _Stages()
    sharded = copy.deepcopy(plain)
    sum(_loss(plain, _ids(other)) for other in range(world)).backward()  # type: ignore[union-attr]
    layout, plan = ParallelLayout(world, ep=world), {"stages.*.*.moe.experts": "experts"}
    parallelize(sharded, layout, device(), plan=plan, activation_checkpointing=mode)
    _loss(sharded, _ids(rank).to(device())).backward()
    return _differences(sharded, plain, gradients=True)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_gradients_of_lists_in_lists_equal_one_process(mode: str) -> None:
    assert_ranks_agree(2, _gradients_of_stages, mode)


def test_recompute_of_experts_in_no_list_says_what_a_layer_is() -> None:
    moe = _decoder().layers[0].moe
    with pytest.raises(ValueError, match=r"cannot serve experts: it is in no layer.*nn.ModuleList.*='none'"):
        check_recompute(moe, resolve_plan(moe, {"experts": "experts"}), "full")
