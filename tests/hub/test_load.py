"""`from_pretrained`: every layout gets the weights, every rank reads its own bytes, and what is wrong is named."""

from __future__ import annotations

import json
import os
import re
import resource
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import parallelize_module
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from lightning_ep import CausalLM, expert_plan, from_pretrained, parallelize
from lightning_ep.hub import reader
from lightning_ep.hub.errors import CheckpointError
from lightning_ep.hub.export import export_sharded
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import LoadStatistics, stream_pretrained
from lightning_ep.hub.safetensors_file import read_header
from lightning_ep.hub.trace import Traced
from lightning_ep.parallelize import shard
from lightning_ep.trainer import cost_warnings as advice
from tests.hub_files import FAMILIES, family_model, full_state, layout, write_checkpoint
from tests.ranks import device, run_ranks
from tests.reference import VOCAB
from tests.tiny import TinyModule, loader, quiet

LAYOUTS = [(1, 1), (2, 2), (4, 2), *(pytest.param(4, ep, marks=pytest.mark.slow) for ep in (1, 4))]


def _stream(path: str, ep: int, tp: int = 1, **overrides: Any) -> tuple[PreTrainedModel, LoadStatistics]:
    """What the strategy does, with the numbers of the reader."""
    model = from_pretrained(path, **overrides)
    here = layout(ep, tp)
    shard(model, here, here.build_meshes(device().type), device(), expert_plan(model), MixedPrecisionPolicy())
    statistics = stream_pretrained(model, device())
    materialize(model, device(), seed=1)
    return model, statistics


def _states(paths: list[str], ep: int, tp: int = 1) -> list[tuple[dict[str, Tensor], LoadStatistics]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "MIN_RUN_BYTES", 256)  # in proportion to the tensors
        loaded = [_stream(path, ep, tp) for path in paths]
    return [(full_state(model) if dist.get_rank() == 0 else _join(model), numbers) for model, numbers in loaded]


def _join(model: PreTrainedModel) -> dict[str, Tensor]:
    full_state(model)
    return {}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """Directories with the weights that transformers itself reads from them."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(root / "per-expert, sharded")
    write_checkpoint(root / "per-expert, one file", sharded=False)
    write_checkpoint(root / "fused", fused=True)
    write_checkpoint(root / "tied", tie_word_embeddings=True)
    # 3 divides no dimension that FSDP could cut: shards of unequal size, experts cut along the expert dimension.
    write_checkpoint(root / "uneven", hidden_size=36, moe_intermediate_size=9, vocab_size=VOCAB + 1)
    for family in FAMILIES:
        family_model(family).save_pretrained(root / family, max_shard_size="40KB")
    return {
        path.name: (path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict())
        for path in sorted(root.iterdir())
    }


@pytest.mark.parametrize(("world", "ep"), LAYOUTS)
def test_every_layout_gets_the_weights_and_reads_its_own_bytes(
    checkpoints: dict[str, tuple[Path, dict[str, Tensor]]], world: int, ep: int
) -> None:
    names = list(checkpoints)
    ranks = run_ranks(world, _states, [str(checkpoints[name][0]) for name in names], ep)
    for index, name in enumerate(names):
        expected = checkpoints[name][1]
        found = ranks[0][index][0]
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert torch.equal(found[key], value), f"{name}: {key}"
        size = sum(tensor.numel() * 4 for key, tensor in expected.items() if not (name == "tied" and "lm_head" in key))
        if name == "inkling2_text":
            continue  # the one family whose conversion must read more
        for rank in ranks:
            assert rank[index][1].bytes_read <= 1.1 * rank[index][1].bytes_needed, name
            # Persistent buffers are on every rank, and uneven shards differ.
            assert rank[index][1].bytes_needed <= 1.25 * size / world, name


@pytest.mark.parametrize(("world", "ep"), [(2, 1), (4, 2)])
def test_tensor_parallel_ranks_read_their_own_bytes(
    checkpoints: dict[str, tuple[Path, dict[str, Tensor]]], world: int, ep: int
) -> None:
    names = ["per-expert, sharded", "tied", "mixtral", "olmoe", "glm4_moe"]
    ranks = run_ranks(world, _states, [str(checkpoints[name][0]) for name in names], ep, 2)
    for index, name in enumerate(names):
        found, _ = ranks[0][index]
        for key, value in checkpoints[name][1].items():
            assert torch.equal(found[key], value), f"{name}: {key}"
        for rank in ranks:
            # Of row-wise layers a rank needs columns, which are narrower here than what is worth a read of its own.
            assert rank[index][1].bytes_read <= 1.2 * rank[index][1].bytes_needed, name


def test_the_families_that_must_read_more_are_those_that_the_documentation_lists() -> None:
    boxes = {"MergeModulelist", "Concatenate", "Chunk", "Split", "Transpose"}
    more = set()
    for model_type, config in CONFIG_MAPPING.items():
        if "ep_dispatch_experts" not in (getattr(config, "base_model_ep_plan", None) or {}).values():
            continue
        transforms = get_checkpoint_conversion_mapping(model_type) or []
        used = {type(op).__name__ for t in transforms if isinstance(t, WeightConverter) for op in t.operations}
        if not used <= boxes:
            more.add(model_type)
    assert more == {"inkling2_text", "inkling2_loop_text"} & set(CONFIG_MAPPING)  # the second since 5.24
    text = (Path(__file__).parents[2] / "docs" / "operate" / "checkpoints.md").read_text()
    assert all(f"`{family}`" in text for family in more)


def test_weights_take_the_parameters_dtype(tmp_path: Path) -> None:
    reference = write_checkpoint(tmp_path).bfloat16()
    reference.save_pretrained(tmp_path / "bf16")
    model = from_pretrained(tmp_path / "bf16")
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    for overrides, dtype in [({}, torch.bfloat16), ({"dtype": "float32"}, torch.float32)]:
        (found, numbers), _ = run_ranks(2, _dtypes, str(tmp_path / "bf16"), overrides)
        assert numbers.bytes_read == sum(p.numel() * 2 for p in reference.parameters()) // 2
        for name, param in reference.named_parameters():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], param.to(dtype)), name


def _dtypes(path: str, overrides: dict[str, Any]) -> tuple[dict[str, Tensor], LoadStatistics]:
    model, numbers = _stream(path, 2, **overrides)
    return full_state(model), numbers


def test_large_tensors_are_read_in_pieces(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path).state_dict()
    model, numbers = run_ranks(1, _chunked, str(tmp_path), 100)[0]
    assert all(torch.equal(model[name], value) for name, value in expected.items())
    assert numbers.bytes_read == numbers.bytes_needed


def _chunked(path: str, size: int) -> tuple[dict[str, Tensor], LoadStatistics]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "CHUNK_BYTES", size)
        model, numbers = _stream(path, 1)
    return full_state(model), numbers


def _fit(root: Path, checkpoint: str) -> tuple[list[str], dict[str, Tensor]]:
    module = CausalLM(checkpoint, optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    data = torch.utils.data.DataLoader([{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4, batch_size=1)
    trainer = quiet(root, max_steps=1)
    trainer.fit(module, data)
    first = full_state(module.model)
    trainer.validate(module, data, verbose=False)  # a rerun changes nothing
    changed = [name for name, value in full_state(module.model).items() if not torch.equal(value, first[name])]
    return changed, first


def _in_memory(root: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        patch.setattr(advice, "_LARGE_MODEL_BYTES", 1)
        warnings.simplefilter("always")
        quiet(root, max_steps=1).fit(TinyModule(), loader())
    return [str(warning.message) for warning in caught]


def test_a_model_in_memory_is_warned_of_and_the_warning_names_this(tmp_path: Path) -> None:
    first, second = run_ranks(2, _in_memory, tmp_path, init_process_group=False)
    (message,) = [text for text in first if "built in memory" in text]
    assert "`lightning_ep.from_pretrained(path)`" in message
    assert not any("built in memory" in text for text in second), "rank 0 says it for all"


def test_causal_lm_streams(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "checkpoint").state_dict()
    for changed, state in run_ranks(2, _fit, tmp_path, str(tmp_path / "checkpoint"), init_process_group=False):
        assert not changed
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def _own_placements(path: str, out: Path) -> tuple[dict[str, Tensor], LoadStatistics]:
    """Experts on a mesh of their own with two copies, everything else whole on every rank; no FSDP."""
    mesh = init_device_mesh(device().type, (2, 2), mesh_dim_names=("copy", "ep"))["ep"]
    model = from_pretrained(path)
    for name, style in expert_plan(model).items():
        parallelize_module(model.get_submodule(name), mesh, style)
    statistics = stream_pretrained(model, device())
    materialize(model, device(), seed=1)
    export_sharded(model, out)
    return full_state(model), statistics


def test_placements_are_all_that_counts(tmp_path: Path) -> None:
    expected = write_checkpoint(tmp_path / "hub").state_dict()
    experts = sum(value.nbytes for name, value in expected.items() if ".experts." in name)
    others = sum(value.nbytes for name, value in expected.items() if ".experts." not in name)
    for found, statistics in run_ranks(4, _own_placements, str(tmp_path / "hub"), tmp_path / "out"):
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert statistics.bytes_read == experts // 2 + others
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(exported[name], value) for name, value in expected.items())
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert max(sizes) < 1.2 * min(sizes), "copies share the writing"


def test_rank_0_shows_how_fast_it_reads_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "hub")
    model = from_pretrained(tmp_path / "hub")
    capsys.readouterr()
    stream_pretrained(model, torch.device("cpu"))
    export_sharded(model, tmp_path / "out")
    shown = capsys.readouterr().err
    for title in ("Loading weights (rank 0)", "Writing weights (rank 0)"):
        assert re.search(rf"{re.escape(title)}: [^\r]*/158k [^\r]*B/s\]", shown), shown


def test_hub_ids_are_found_in_the_cache_when_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository, commit = tmp_path / "models--tiny--moe", "0123456789" * 4
    expected = write_checkpoint(repository / "snapshots" / commit).state_dict()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision in (None, commit):
        model = from_pretrained("tiny/moe", revision=revision)
        stream_pretrained(model, torch.device("cpu"))
        assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
    with pytest.raises(CheckpointError, match="'tiny/other' is no directory here"):
        from_pretrained("tiny/other")


# ---------------------------------------------------------------------- what is refused


def _message(path: str, ep: int) -> str:
    try:
        _stream(path, ep)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def _edit(path: Path, key: str, change: Any) -> None:
    """Changes one tensor of a sharded checkpoint (None removes it) and leaves the index alone."""
    file = path / json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][key]
    tensors = load_file(file)
    value = change(tensors.pop(key))
    if value is not None:
        tensors[key] = value
    save_file(tensors, file, {"format": "pt"})


def test_all_that_is_wrong_is_in_one_error_on_every_rank(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    expert = "model.layers.{}.mlp.experts.{}.{}_proj.weight".format
    touched = {name: expert(1, i, name) for i, name in enumerate(("gate", "up", "down"))}
    _edit(tmp_path, touched["gate"], lambda t: t[:-1].contiguous())
    _edit(tmp_path, touched["up"], lambda t: None)
    _edit(tmp_path, "model.layers.1.self_attn.q_proj.weight", lambda t: t.to(torch.int32))
    _edit(tmp_path, touched["down"], lambda t: t)
    used = {index[key] for key in (*touched.values(), "model.layers.1.self_attn.q_proj.weight")}
    others = sorted(set(index.values()) - used)
    truncated, missing = others[:2]
    (tmp_path / missing).unlink()
    with open(tmp_path / truncated, "r+b") as stream:
        stream.truncate((tmp_path / truncated).stat().st_size - 10)
    extra = tmp_path / index["model.norm.weight"] if index["model.norm.weight"] not in others[:2] else None
    assert extra is not None
    save_file({**load_file(extra), "model.layers.7.mlp.gate.weight": torch.ones(8, 32)}, extra, {"format": "pt"})
    ranks = run_ranks(4, _message, str(tmp_path), 2)
    assert len(set(ranks)) == 1
    lines = [line.strip() for line in ranks[0].splitlines()]
    assert "does not fit Qwen3MoeForCausalLM" in lines[0]
    assert any(line.startswith(f"{truncated}: truncated") for line in lines)
    assert any(line.startswith(f"{missing}: no such file") for line in lines)
    assert touched["up"] in lines[lines.index("missing (1):") + 1]
    assert "model.layers.7.mlp.gate.weight" in lines[lines.index("unexpected (1):") + 1]
    assert lines[lines.index("shape (1):") + 1] == f"{touched['gate']}: [15, 32], the model needs [16, 32]"
    assert lines[lines.index("dtype (1):") + 1].startswith("model.layers.1.self_attn.q_proj.weight: int32")
    assert len(lines) == 12, ranks[0]


def test_many_findings_of_one_form_take_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sharded=False)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: t for k, t in tensors.items() if "up_proj" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match=r"layers\.\*\.mlp\.experts\.\*\.up_proj\.weight: 128, as") as info:
        stream_pretrained(from_pretrained(tmp_path, num_experts=64), torch.device("cpu"))
    assert len(str(info.value)) < 2000
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        stream_pretrained(from_pretrained(tmp_path), torch.device("cpu"))


def test_other_architectures_and_formats_are_refused(tmp_path: Path) -> None:
    good, bad, pickled = tmp_path / "good", tmp_path / "bad", tmp_path / "pickled"
    write_checkpoint(good, sharded=False)
    with pytest.raises(CheckpointError, match=r"Qwen3MoeForCausalLM .* a Qwen3MoeForSequenceClassification was asked"):
        from_pretrained(good, auto_class=AutoModelForSequenceClassification)
    write_checkpoint(bad, sharded=False)
    MixtralConfig(**{**tiny_sizes(), "architectures": ["MixtralForCausalLM"]}).save_pretrained(bad)
    save_file({"transformer.wte": torch.ones(2)}, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"architecture .*\n.*none of the checkpoint's 1 tensors"):
        stream_pretrained(from_pretrained(bad), torch.device("cpu"))
    pickled.mkdir()
    (pickled / "config.json").write_text((good / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="a pickle can run any code"):
        from_pretrained(pickled)
    with pytest.raises(CheckpointError, match="there is no directory"):
        from_pretrained("./nothing/here")
    with pytest.raises(TypeError, match="Qwen3MoeConfig has no router_aux_loss_coeff"):
        from_pretrained(good, router_aux_loss_coeff=0.5)
    assert from_pretrained(good, router_aux_loss_coef=0.5, dtype="bfloat16").config.router_aux_loss_coef == 0.5
    config = json.loads((good / "config.json").read_text())
    (good / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match="quantized"):
        from_pretrained(good)


def test_a_copy_of_a_tied_parameter_that_is_none_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sharded=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"tied .*\n.*lm_head.weight and model.embed_tokens.weight differ"):
        stream_pretrained(from_pretrained(tmp_path), torch.device("cpu"))
    apart = from_pretrained(tmp_path, tie_word_embeddings=False)
    stream_pretrained(apart, torch.device("cpu"))
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(apart.lm_head.weight, weights["lm_head.weight"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    stream_pretrained(tied := from_pretrained(tmp_path), torch.device("cpu"))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def tiny_sizes() -> dict[str, Any]:
    return {
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_local_experts": 2,
    }


def test_declared_optional_names_are_passed_over(tmp_path: Path) -> None:
    expected = family_model("deepseek_v3")
    expected.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    # The multi-token prediction layer that DeepSeek's checkpoints hold and transformers does not build.
    tensors["model.layers.61.eh_proj.weight"] = torch.ones(2)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = from_pretrained(tmp_path)
    stream_pretrained(model, torch.device("cpu"))
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, sharded=False)
    file = tmp_path / "model.safetensors"
    stored = read_header(file)["lm_head.weight"]
    with open(file, "r+b") as stream:
        stream.truncate(stored.offset + 100)
    target = torch.empty(stored.shape)
    whole = Traced.source("lm_head.weight", stored.shape, stored.dtype)
    batches = reader.batches_of(list(reader.reads_of(stored, whole.pieces[0], target)))
    with pytest.raises(reader.ReadError, match=r"model\.safetensors: ended at byte"):
        reader.read_all(batches, torch.device("cpu"))


# ---------------------------------------------------------------------- memory


ON_HOST = pytest.mark.skipif(
    os.environ.get("LIGHTNING_EP_TEST_DEVICE") == "cuda", reason="shards are not in host memory"
)


def _growth(path: str, ep: int) -> tuple[int, int]:
    model = from_pretrained(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parallelize(model, layout(ep), device())
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    held = sum(p.to_local().numel() * p.element_size() for p in model.parameters())
    return after - before, held


@ON_HOST
def test_host_memory_is_the_shard_and_little_more(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 768, "num_experts": 32, "vocab_size": 8192}
    model = write_checkpoint(tmp_path, sharded=False, **sizes)
    total = sum(p.numel() * 4 for p in model.parameters())
    assert total > 300e6
    del model
    for growth, held in run_ranks(2, _growth, str(tmp_path), 2):
        assert held == pytest.approx(total / 2, rel=0.01)
        assert growth < 1.25 * held, f"{growth / 1e6:.0f} MB for a shard of {held / 1e6:.0f} MB of {total / 1e6:.0f} MB"
