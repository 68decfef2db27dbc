"""What works with which family: every stage of its life on two ranks, against one process.

Writes docs/reference/models.md from tests/survey.jsonl, which keeps what was found.

python -m tests.survey mixtral gpt_oss --page docs/reference/models.md    # these rows anew
python -m tests.survey --page docs/reference/models.md     # what the record lacks; of all families half an hour
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lightning_ep import LoRA, ParallelLayout, add_adapter, from_pretrained, parallelize, shard_sequence
from lightning_ep import transformers_adapter as adapter
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.moe.experts import expert_context
from tests.hub.every_family import FAMILIES, auto_class_of, tiny_config_of
from tests.multimodal import IMAGES, called, image_batch, in_dtype_of, multimodal_model, text_batch
from tests.parity import as_peft
from tests.ranks import RankFailure, device, here, run_ranks
from tests.reference import grad_or_zero, relative_error

Inputs = dict[str, Any]
Change = Callable[[Any], Any]
RECORD = Path(__file__).with_suffix(".jsonl")
_TOLERANCE = 2e-5  # of fp32; linear attention makes more of a rounding than softmax does


def _batch(family: str, model: nn.Module, seed: int) -> Inputs:
    batch, known = text_batch(seed), inspect.signature(called(model).forward).parameters
    return {key: value for key, value in batch.items() if key in known} | (
        {"use_cache": False} if "use_cache" in known or "kwargs" in known else {}
    )


def _loss(model: nn.Module, batch: Inputs) -> Tensor:
    output = called(model)(**batch)
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    hidden = output[0]  # of a norm: of one length, but not of one direction
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).square().mean()


def _backward(model: nn.Module, batch: Inputs) -> Tensor:
    loss = _loss(model, here(batch))
    loss.backward()
    return loss.detach()


def _plain(family: str, change: Change) -> Any:
    """One process, on the same kind of device: an indexer's top tokens tie, and devices break ties differently."""
    return change(multimodal_model(family)).to(device())


def _grads(plain: nn.Module) -> dict[str, Tensor]:
    return {name: grad_or_zero(param).cpu() for name, param in plain.named_parameters()}


@functools.lru_cache(maxsize=4)  # the stages of a family, one after the other
def _reference(family: str, seeds: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process over several batches."""
    model = _plain(family, _unchanged)
    total = sum(_backward(model, _batch(family, model, seed)).item() for seed in seeds)
    return total, _grads(model)


def _compare(model: nn.Module, wanted: dict[str, Tensor]) -> str:
    """The gradient that differs most, if any does."""
    errors = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            grad = param.grad if param.grad is not None else torch.zeros_like(param)
            whole = as_peft(name, grad.full_tensor().cpu() if isinstance(grad, DTensor) else grad.cpu())
            # Where the true gradient is all but zero (a key bias shifts every score alike) only noise is left.
            if not (whole - wanted[name]).norm() <= 1e-6:
                errors[name] = relative_error(whole, wanted[name])
    worst = max(errors, key=lambda name: errors[name], default="")
    return f"the gradient of {worst} is off by {errors[worst]:.1e}" if worst and errors[worst] > _TOLERANCE else ""


def _exact(trains: Callable[[Change], str], change: Change) -> str:
    """What is wrong in fp32 and, where rounding grows, in float64 too, where only what a family has in fp32 rounds."""
    return trains(change) and trains(partial(_double, change))


def _double(change: Change, model: Any) -> Any:
    return change(model).double()


def _trains(family: str, change: Change, **options: Any) -> str:
    return _exact(partial(_trains_so, family, **options), change)


def _trains_so(family: str, change: Change, **options: Any) -> str:
    rank, model = dist.get_rank(), change(multimodal_model(family))
    if change is not _unchanged:
        expected = _plain(family, change)
        losses = sum(_backward(expected, _batch(family, expected, seed)).item() for seed in range(2))
        wanted = _grads(expected)
    else:
        losses, wanted = _reference(family, (0, 1))
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device(), **options)
    loss = _backward(model, _batch(family, model, rank))
    dist.all_reduce(loss)
    off = abs(loss.item() - losses) / abs(losses)
    return f"the loss is off by {off:.1e}" if off > _TOLERANCE else _compare(model, wanted)


def _unchanged(model: Any) -> Any:
    return model


def gradients(family: str, folder: Path) -> str:
    return _trains(family, _unchanged)


def recompute(family: str, folder: Path) -> str:
    return _trains(family, _unchanged, activation_checkpointing="full")


def bf16(family: str, folder: Path) -> str:
    losses, wanted = _reference(family, (0, 1))
    loss, found = _in_bf16(family)
    alike, off = _cosine(found, wanted), abs(loss - losses) / abs(losses)
    if off < 0.1 and alike > 0.8:
        return ""
    narrow = _plain(family, _unchanged).bfloat16()
    for seed in range(2):
        _backward(narrow, _batch(family, narrow, seed))
    theirs = _cosine({n: p.grad.cpu() for n, p in narrow.named_parameters() if p.grad is not None}, wanted)
    if off < 0.1 and alike > theirs - 0.15:  # as far as Gemma 4's are from batch to batch, theirs and ours
        return ""
    held = _cosine(_in_bf16(family, _chosen(family))[1], wanted)
    if off < 0.1 and held > 0.8:  # near-ties in routers sent tokens elsewhere
        return ""
    return f"the loss is off by {off:.1e}, the gradient's cosine is {alike:.2f}, of transformers in bf16 {theirs:.2f}"


def _in_bf16(family: str, chosen: dict[str, Tensor] | None = None) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients in bf16-mixed; ``chosen`` is which experts each layer takes, whatever its router says."""
    model = multimodal_model(family)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device(), mp_policy=policy)
    for name, ids in (chosen or {}).items():
        expert_context(model.get_submodule(name)).route = lambda _, ids=ids: ids  # type: ignore[misc]
    loss = _backward(model, _batch(family, model, dist.get_rank()))
    dist.all_reduce(loss)
    return loss.item(), {n: p.grad.full_tensor().cpu() for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def _chosen(family: str) -> dict[str, Tensor]:
    """Which experts the tokens of this rank's batch take in fp32, by the name of the experts module."""
    model, chosen = multimodal_model(family), {}
    for name, module in model.named_modules():
        if adapter.picks_its_implementation(module):
            function = partial(chosen.__setitem__, name)
            module.register_forward_pre_hook(lambda module, args, function=function: function(args[1]))  # type: ignore[misc]
    _loss(model, _batch(family, model, dist.get_rank()))
    return {name: ids.to(device()) for name, ids in chosen.items()}


def _cosine(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    one, other = (torch.cat([grads[name].flatten().double() for name in found]) for grads in (found, wanted))
    return torch.nn.functional.cosine_similarity(one, other, dim=0).item()


def tp(family: str, folder: Path) -> str:
    return _exact(partial(_tp, family), _unchanged)


def _tp(family: str, change: Change) -> str:
    plain, model = _plain(family, change), change(multimodal_model(family))
    batch = _batch(family, plain, 0)
    if family in IMAGES:
        batch = {**in_dtype_of(plain, image_batch(family, multimodal_model(family), 0)), "use_cache": False}
    loss = _backward(plain, batch).item()
    wanted = _grads(plain)
    layout = ParallelLayout.resolve(2, 1, 2, 2, tp=2)
    parallelize(model, layout, device())
    found = _loss(model, here(batch))
    (found / layout.loss_world_size).backward()
    off = abs(found.item() - loss) / abs(loss)
    return f"the loss is off by {off:.1e}" if off > _TOLERANCE else _compare(model, wanted)


def cp(family: str, folder: Path) -> str:
    return _exact(partial(_cp, family), _unchanged)


def _cp(family: str, change: Change) -> str:
    plain, model = _plain(family, change), change(multimodal_model(family))
    batch = _batch(family, plain, 0)
    wanted_loss = _backward(plain, batch).item()
    wanted = _grads(plain)
    layout = ParallelLayout.resolve(2, 1, 2, 2, cp=2)
    meshes = parallelize(model, layout, device())
    loss = _loss(model, shard_sequence(here(batch), meshes.cp)) / layout.loss_world_size
    loss.backward()
    loss = loss.detach()
    dist.all_reduce(loss)
    off = abs(loss.item() - wanted_loss) / abs(wanted_loss)
    return f"the loss is off by {off:.1e}" if off > _TOLERANCE else _compare(model, wanted)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu() for n, v in state.items()}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    if found.keys() != expected.keys():
        return f"{sorted(found.keys() ^ expected.keys())[:2]} are on one side only"
    wrong = [name for name, value in found.items() if not torch.equal(value, expected[name])]
    return f"{wrong[0]} and {len(wrong) - 1} others differ" if wrong else ""


def export(family: str, folder: Path) -> str:
    model = multimodal_model(family)
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device())
    export_sharded(model, folder / "exported")
    auto_class: Any = auto_class_of(model.config)
    again = auto_class.from_pretrained(folder / "exported", dtype=torch.float32)
    return _same(_tensors(again), _tensors(multimodal_model(family)))


def load(family: str, folder: Path) -> str:
    plain = multimodal_model(family)
    if dist.get_rank() == 0:
        plain.save_pretrained(folder / "saved")
    dist.barrier()
    auto_class: Any = auto_class_of(plain.config)
    expected = auto_class.from_pretrained(folder / "saved", dtype=torch.float32)
    model = from_pretrained(folder / "saved", auto_class, dtype=torch.float32)
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device())
    return _same(_tensors(model), _tensors(expected))


def scratch(family: str, folder: Path) -> str:
    config = tiny_config_of(family)
    one, sharded = _on_meta(config), _on_meta(config)
    materialize(one, torch.device("cpu"), seed=7)
    parallelize(sharded, ParallelLayout.resolve(2, 1, 2, 2), device(), seed=7)
    return _same(_tensors(sharded), _tensors(one))


def _on_meta(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = auto_class_of(config).from_config(deepcopy(config))
    adapter.note_own_modules(model)
    return model


def lora(family: str, folder: Path) -> str:
    def adapted(model: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return add_adapter(model, LoRA(r=3, lora_alpha=5, init_lora_weights=False, experts=True))

    return _trains(family, adapted)


def image(family: str, folder: Path) -> str:
    return _exact(partial(_image, family), _unchanged)


def _image(family: str, change: Change) -> str:
    rank, plain, model = dist.get_rank(), _plain(family, change), multimodal_model(family)
    more = {"use_cache": False}
    with_image = image_batch(family, model, 0)  # asks the model, of which it wants fp32
    model = change(model)
    batches = [{**in_dtype_of(model, with_image), **more}, {**text_batch(1), **more}]
    parallelize(model, ParallelLayout.resolve(2, 1, 2, 2), device())
    for batch in batches:
        _backward(plain, batch)
    _backward(model, batches[rank])
    for (name, param), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if (param.grad is None) != (expected.grad is None) and not _is_idle(name, expected):
            return f"{name} has {'no' if param.grad is None else 'a'} gradient"
    return _compare(model, _grads(plain))


def _is_idle(name: str, param: Tensor) -> bool:
    """Whether these may be experts that no token came to: zeros here, None there."""
    return ".experts." in name and param.grad is None


STAGES: dict[str, Callable[[str, Path], str]] = {
    stage.__name__: stage for stage in (gradients, recompute, bf16, tp, cp, export, load, scratch, lora, image)
}


def _run(family: str, names: list[str], folder: Path) -> None:
    """Runs stages of a family, and notes of each what is wrong."""
    logging.set_verbosity_error()
    torch.backends.cudnn.allow_tf32 = False  # of convolutions over patches, on GPUs
    rank = dist.get_rank()
    store = dist.distributed_c10d._get_default_store()
    for name in names:
        began = time.perf_counter()
        try:
            found = STAGES[name](family, folder)
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        (folder / f"{name}.{rank}").write_text(found)
        print(f"{family} {name}: {time.perf_counter() - began:.1f} s {found}", flush=True)
        store.set(f"{folder.name}-{name}-{rank}", "")
        store.wait([f"{folder.name}-{name}-{1 - rank}"], timedelta(seconds=20))


def survey(family: str, stages: list[str] | None = None, timeout: float = 90.0) -> dict[str, str]:
    """What is wrong by stage, empty where nothing is; without ``image`` for a family that has none here."""
    left = [name for name in stages or STAGES if name != "image" or family in IMAGES]
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        while left:
            folder = Path(tempfile.mkdtemp(dir=root))
            try:
                run_ranks(2, _run, family, left, folder, timeout=timeout)
            except RankFailure as failure:
                hung = str(failure).splitlines()[0]
            for name in list(left):
                notes = [folder / f"{name}.{rank}" for rank in range(2)]
                ended = [note.read_text() for note in notes if note.exists()]
                if len(ended) == 2 and (ended[0] == ended[1] or not all(ended)):
                    found[name] = ended[0] or ended[1]
                elif ended:
                    found[name] = f"on one rank: {max(ended)}"
                else:
                    break
                left.remove(name)
            else:
                continue
            if not any((folder / f"{name}.0").exists() for name in found):
                found[left.pop(0)] = hung
    return found


def path_of(family: str) -> str:
    """Which kernels run the experts of a family: ours, or transformers' and why."""
    with torch.device("meta"):
        config = tiny_config_of(family)
        model = auto_class_of(config).from_config(config)
    models = adapter.called_models(model).values()
    reasons = {adapter.why_not_fused(experts) for part in models for experts in adapter.experts_modules(part).values()}
    return "fused" if reasons == {None} else ", ".join(sorted(str(reason or "fused") for reason in reasons))


@dataclass(frozen=True)
class _Cause:
    """Where a "no" comes from.

    Attributes:
        what: In words.
        upstream: Whether transformers has to change first; else it is not done here.
        file: Which file of a family says so: ``"model"``, or ``"config"`` (that of its text).
        lines: The line there, as regular expressions, of which the first that is there counts.
    """

    what: str
    upstream: bool
    file: str
    lines: tuple[str, ...]


# By words of the message.
_CAUSES = {
    "are one parameter": _Cause(
        "it ties the experts of encoder and decoder", True, "model", ("_tied_weights_keys = {",)
    ),
    "layer_scalar is on the meta": _Cause(
        "only its constructor sets this buffer, no rule does", True, "model", (r"layer_scalar = nn\.Buffer",)
    ),
    "belongs to no experts": _Cause("the tied experts, again", True, "model", ("_tied_weights_keys = {",)),
    "leave this parameter unset": _Cause(
        "`_init_weights` has the thinker's router and not the talker's, which stays as its constructor leaves it",
        True,
        "model",
        ("class Qwen3OmniMoeTalkerTextTopKRouter",),
    ),
    "no tensor-parallel plan": _Cause(
        "`base_model_tp_plan` is missing, empty, or names no attention",
        True,
        "config",
        ("base_model_tp_plan", "^class .*Config"),
    ),
    "does not cover": _Cause(
        "`base_model_tp_plan` leaves it out: a tower, or linear attention", True, "config", ("base_model_tp_plan",)
    ),
    "inside of another module": _Cause(
        "a whole model is declared to be one block", True, "model", ('^        "Qwen3OmniMoeTalkerCodePredictorModel',)
    ),
    "has the style": _Cause("`tensor_parallel/styles.py` lacks it", False, "config", ('"embedding_colwise"',)),
    "splits the input of": _Cause(
        "the plan's `o_proj` is of the softmax layers, and linear attention has one of that name",
        True,
        "config",
        ('self_attn.o_proj"',),
    ),
    "beside hidden states": _Cause(
        "an argument of the decoder layer's `forward`",
        False,
        "model",
        (r"^        (moe_mm_token_type_ids|per_layer_input): ",),
    ),
    "inputs are no tokens": _Cause(
        "the forward puts features in the places of tokens of the whole sequence",
        False,
        "model",
        (r"inputs_embeds\.masked_scatter", "masked_scatter", r"inputs_embeds\[", "inputs_embeds = torch.where"),
    ),
    "layers of the types": _Cause(
        "only masks of softmax attention are known",
        False,
        "config",
        (r"self\.layer_types = ", r"^    layer_types", "layer_types"),
    ),
    "attention interface": _Cause(
        "the mixer calls no `ALL_ATTENTION_FUNCTIONS`", False, "model", (r"^class \w*Mixer\(", r"^class \w*Attention\(")
    ),
    "is not causal": _Cause("only causal attention is split", False, "model", ("is_causal = False",)),
}


def _why(message: str) -> tuple[str, _Cause]:
    """The rule in a refusal, without what it says of one model and what to do instead, and where it comes from."""
    rule = re.sub(r"^\w+: ([ct]p=2 (does not fit|cannot serve) \S+ \(\S+\): )?", "", message)
    rule = re.split(r" Expert parallelism needs no such plan| Use cp=1|, of modules that|, so that? |\. ", rule)[0]
    rule = re.sub(r"(?<![\w.'])(model|layers|encoder|decoder|talker|code_predictor)(\.\w+)+", "a module", rule)
    return rule.rstrip("."), next(cause for words, cause in _CAUSES.items() if words in message)


def _line(family: str, cause: _Cause) -> str:
    """The file of transformers and the line that a cause names, of one family."""
    config = tiny_config_of(family)
    model = auto_class_of(config)._model_mapping[type(config)]
    owners = [type(config.get_text_config()), type(config)] if cause.file == "config" else [model]
    for line in cause.lines:
        for path in (Path(inspect.getfile(owner)) for owner in owners):
            for number, text in enumerate(path.read_text().splitlines(), 1):
                if re.search(line, text):
                    return f"{path.parent.name}/{path.name}:{number}"
    raise LookupError(f"{cause.lines} are in no file of {family}: {owners}")


def _directories(family: str) -> set[str]:
    """The directories of transformers whose plan for experts a family uses."""

    def inside(config: Any) -> Iterator[str]:
        if "ep_dispatch_experts" in (getattr(type(config), "base_model_ep_plan", None) or {}).values():
            yield Path(inspect.getfile(type(config))).parent.name
        for part in vars(config).values():
            if isinstance(part, PreTrainedConfig):
                yield from inside(part)

    return set(inside(tiny_config_of(family)))


def _summary(rows: dict[str, dict[str, Any]]) -> str:
    """How many directories do all that is no split of attention."""
    of, failing = {family: _directories(family) for family in rows}, dict[str, list[str]]()
    for family, row in rows.items():
        found = row["found"]
        stages = [stage for stage in STAGES if found.get(stage) and stage not in ("tp", "cp")]
        own = {where for where in of[family] if family.startswith(where)} or of[family]
        for where in own if stages else ():
            failing.setdefault(where, []).append(f"`{family}`: {', '.join(stages)}")
    said = "; ".join(what for where in sorted(failing) for what in failing[where])
    number = len(set().union(*of.values()))
    return (
        f"Of {number} directories of transformers with such a plan {number - len(failing)} pass every column but `tp` "
        f"and `cp`, which split attention and are refused by name where it cannot be split. The others: {said}."
    )


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/reference/models.md of what `survey` has found."""
    stages = list(STAGES)
    lines = [_HEAD, _summary(rows), ""]
    lines += [f"| model type | {' | '.join(stages)} | experts |", f"|---|{'---|' * (len(stages) + 1)}"]
    whys: dict[tuple[str, _Cause], dict[str, list[str]]] = {}
    paths: dict[str, list[str]] = {}
    for family, row in rows.items():
        found = row["found"]
        cells = ["" if stage not in found else "no" if found[stage] else "yes" for stage in stages]
        lines.append(f"| `{family}` | {' | '.join(cells)} | {'fused' if row['path'] == 'fused' else 'transformers'} |")
        for stage in (stage for stage in stages if found.get(stage)):
            whys.setdefault(_why(found[stage]), {}).setdefault(family, []).append(stage)
        if row["path"] != "fused":
            paths.setdefault(row["path"], []).append(f"`{family}`")
    lines += ["", "## Why not", "", _WHY]
    for (rule, cause), families in whys.items():
        concerned = ", ".join(stage for stage in stages if any(stage in found for found in families.values()))
        whose = "transformers" if cause.upstream else "here"
        where = ", ".join(f"`{family}` ({_line(family, cause)})" for family in families)
        lines.append(f"- **{concerned}** ({whose}): {rule}: {cause.what}. {where}.")
    lines += ["", "## Why transformers' kernels", ""]
    lines += [f"- {why}: {', '.join(families)}." for why, families in sorted(paths.items())]
    return "\n".join(lines) + "\n"


_WHY = """In brackets is where a change is needed: in transformers, or here. Files are below `transformers/models/`, lines of 5.23.0.
"""  # noqa: E501

_HEAD = """# Which models work

Every model type with an expert-parallel plan that transformers 5.23 can build from a tiny configuration of its own class, on two
ranks (gloo, `ep=2`), against one process. Written by `python -m tests.survey --page docs/reference/models.md`, which trains, saves and loads them
(`python -m tests.survey FAMILY --page docs/reference/models.md` does one anew; `tests/survey.jsonl` keeps what was found);
`tests/test_every_family.py` compares these rows with what is so today (ten families, the others with `-m slow`).

| | yes means |
|---|---|
| gradients | loss and every gradient equal those of one process to 2e-5, in fp32 or, where rounding grows (Gemma 4), in float64 |
| recompute | the same with `activation_checkpointing="full"` |
| bf16 | in bf16-mixed the loss is within a tenth, and the gradient points the same way (cosine above 0.8, or at most 0.15 below that of transformers in bf16), if need be with the experts that fp32 chooses: near-ties in routers send tokens elsewhere |
| tp, cp | the same as the first with `tp=2` (with an image where there is one), with `cp=2` |
| export | transformers reads what was exported, bit for bit |
| load | what is streamed from a checkpoint is what transformers loads, bit for bit |
| scratch | random weights do not depend on the layout (that they follow the family's rules: `tests/hub/test_family_weights.py`) |
| lora | gradients of adapters on attention and experts equal PEFT's, as in the first |
| image | gradients where one rank's batch has an image and the other's has none; empty for text models, and where no picture was made |

A family with experts that is not here declares no plan: a [plan of one's own](../extend/plans.md).
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="these anew; default: all that the record lacks")
    parser.add_argument("--stages", nargs="*", help="only these; others stay as the record has them")
    parser.add_argument("--record", type=Path, default=RECORD, help="what was found, a line per family")
    parser.add_argument("--page", type=Path, help="is written from the record")
    arguments = parser.parse_args()
    lines = arguments.record.read_text().splitlines() if arguments.record.exists() else []
    rows = {row["family"]: row for row in map(json.loads, lines)}
    for family in arguments.families or [family for family in FAMILIES if family not in rows]:
        began, found = time.perf_counter(), survey(family, arguments.stages)
        before = rows.get(family, {}).get("found", {}) if arguments.stages else {}
        rows[family] = {"family": family, "path": path_of(family), "found": {**before, **found}}
        known = {name: rows[name] for name in FAMILIES if name in rows}
        arguments.record.write_text("".join(f"{json.dumps(row)}\n" for row in known.values()))
        no = {name: what for name, what in found.items() if what}
        seconds = time.perf_counter() - began
        print(f"{family}: {len(found) - len(no)} of {len(found)} ({seconds:.0f} s, {rows[family]['path']})", flush=True)
        for name, what in no.items():
            print(f"    {name}: {what[:400]}", flush=True)
    if arguments.page is not None:
        rows = {family: {**rows[family], "path": path_of(family)} for family in FAMILIES if family in rows}
        arguments.page.write_text(page(rows))


if __name__ == "__main__":
    main()
