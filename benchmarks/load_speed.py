"""How fast a Hugging Face checkpoint streams into shards, beside a plain sequential read of the same files.

Writes (once) a model of Qwen3-30B-A3B's width with random bf16 weights in the hub's layout, then measures, with the
page cache in the same state for both: the sequential read of all files by one process, and the load by all ranks, the
better of two rounds each. Cold means that every file was dropped from the page cache before. Prints one JSON line.

    python benchmarks/load_speed.py --directory /local/disk/checkpoint --ranks 2                # 12 layers, 15 GB
    python benchmarks/load_speed.py --directory /tmp/checkpoint --ranks 2 --layers 1 --scale 8  # small, anywhere

Ranks use NCCL on GPUs (several may share one) or gloo on CPUs (``--device cpu``).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig

from lightning_ep import ParallelLayout, expert_plan, from_pretrained
from lightning_ep.hub.initialize import materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.hub.safetensors_file import INDEX_NAME, SafetensorsWriter
from lightning_ep.hub.writer import plan_files, plan_groups
from lightning_ep.parallelize import shard

READ_BYTES = 32 * 2**20


def config(layers: int, scale: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B with fewer layers and (scale > 1) narrower."""
    return Qwen3MoeConfig(
        vocab_size=151936 // scale,
        hidden_size=2048 // scale,
        intermediate_size=6144 // scale,
        num_hidden_layers=layers,
        num_attention_heads=32 // scale,
        num_key_value_heads=max(1, 4 // scale),
        head_dim=128,  # type: ignore[call-arg]
        moe_intermediate_size=768 // scale,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )


def write_checkpoint(directory: Path, model_config: Qwen3MoeConfig) -> None:
    """One tensor in memory at a time; every expert gets the same random numbers, which no reader can notice."""
    if (directory / INDEX_NAME).exists() and json.loads((directory / "config.json").read_text())[
        "num_hidden_layers"
    ] == model_config.num_hidden_layers:
        return
    directory.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    groups = plan_groups(model, dict.fromkeys(model.state_dict(), torch.bfloat16))
    files = plan_files(groups, {spec.key: 0 for group in groups for spec in group.outputs}, 1)
    noise = torch.randn(max(spec.nbytes // 2 for file in files for spec in file.specs), dtype=torch.bfloat16) * 0.02
    for file in files:
        writer = SafetensorsWriter(directory / file.name, file.specs)
        for spec in file.specs:
            writer.write(spec.key, noise[: spec.nbytes // 2].view(spec.shape))
        writer.close()
    weight_map = {spec.key: file.name for file in files for spec in file.specs}
    model_config.save_pretrained(directory)
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def weight_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def drop_from_cache(directory: Path) -> None:
    for file in weight_files(directory):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_sequentially(directory: Path) -> float:
    """Seconds to read all files from beginning to end into one buffer."""
    buffer = bytearray(READ_BYTES)
    start = time.perf_counter()
    for file in weight_files(directory):
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def peak_host_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rounds(cold: bool, directory: Path) -> Iterator[None]:
    """Two rounds, so that the second of the warm ones certainly finds all in the cache; the better one counts."""
    for _ in range(2):
        if cold:
            drop_from_cache(directory)
        yield


def load(rank: int, ranks: int, store: str, directory: Path, device_type: str, cold: bool, out: str) -> None:
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        if torch.cuda.device_count() < ranks:  # NCCL refuses two ranks of one host on one GPU
            os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        device_id=device if device_type == "cuda" else None,
    )
    layout = ParallelLayout.resolve(ranks, "auto", ranks, ranks)
    meshes = layout.build_meshes(device.type)
    seconds = []
    growth = shard_bytes = read_bytes = 0
    for _ in range(2):
        model = from_pretrained(directory)
        shard(model, layout, meshes, device, expert_plan(model), MixedPrecisionPolicy())
        before = peak_host_bytes()
        if cold and rank == 0:
            drop_from_cache(directory)
        dist.barrier()
        start = time.perf_counter()
        statistics = stream_pretrained(model, device)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        growth = growth or peak_host_bytes() - before  # of the first round: the second finds memory that is free
        materialize(model, device, 0)
        assert not any(tensor.is_meta for tensor in model.state_dict().values())
        shard_bytes = sum(p.to_local().numel() * p.element_size() for p in model.parameters())  # type: ignore[attr-defined]
        read_bytes = statistics.bytes_read
        del model
        gc.collect()
    result = {
        "seconds": seconds,
        "read_bytes": read_bytes,
        "shard_bytes": shard_bytes,
        "host_growth_bytes": growth,
    }
    Path(f"{out}.{rank}").write_text(json.dumps(result))
    dist.destroy_process_group()


def measure(directory: Path, ranks: int, device_type: str, cold: bool) -> dict[str, Any]:
    raw = min(read_sequentially(directory) for _ in rounds(cold, directory))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, f"{folder}/store", directory, device_type, cold, f"{folder}/result")
        spawn(load, arguments, nprocs=ranks)
        results = [json.loads(Path(f"{folder}/result.{rank}").read_text()) for rank in range(ranks)]
    size = sum(file.stat().st_size for file in weight_files(directory))
    seconds = min(max(times) for times in zip(*(result["seconds"] for result in results), strict=True))
    return {
        "raw_GB_per_s": round(size / raw / 1e9, 3),
        "load_GB_per_s": round(size / seconds / 1e9, 3),
        "load_seconds": round(seconds, 2),
        "load_over_raw": round(raw / seconds, 3),
        "read_GB_per_rank": [round(result["read_bytes"] / 1e9, 3) for result in results],
        "shard_GB_per_rank": [round(result["shard_bytes"] / 1e9, 3) for result in results],
        "host_growth_GB_per_rank": [round(result["host_growth_bytes"] / 1e9, 3) for result in results],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the checkpoint is or will be written")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--scale", type=int, default=1, help="divides all widths; 8 for a quick trial")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    write_checkpoint(arguments.directory, config(arguments.layers, arguments.scale))
    size = sum(file.stat().st_size for file in weight_files(arguments.directory))
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    cold = measure(arguments.directory, arguments.ranks, arguments.device, cold=True)
    warm = measure(arguments.directory, arguments.ranks, arguments.device, cold=False)
    figures = {"device": device, "ranks": arguments.ranks, "checkpoint_GB": round(size / 1e9, 3)}
    print(json.dumps({**figures, "cold": cold, "warm": warm}))


if __name__ == "__main__":
    main()
