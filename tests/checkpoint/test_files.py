"""Damage is found by name before anything is loaded; names change hands atomically; no pickle from strangers is run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_ep import ExpertParallelStrategy
from lightning_ep.checkpoint import files
from lightning_ep.checkpoint.background import JobQueue, Worker
from lightning_ep.checkpoint.single_file import gather_optimizer
from lightning_ep.checkpoint.staging import HostBuffer
from lightning_ep.hub.errors import CheckpointError
from tests.ranks import run_ranks
from tests.tiny import TinyModule, loader, quiet

# ---------------------------------------------------------------------------------------------------- damage


def _truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 7)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def _load_damaged(root: Path) -> dict[str, str]:
    """The message of every way to damage every kind of file, and at the end a load that works."""
    module = TinyModule()
    trainer = quiet(root, max_steps=1)
    trainer.fit(module, loader())
    good = root / "good.ckpt"
    trainer.save_checkpoint(good)
    one_file = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=False)
    trainer = quiet(root, strategy=one_file, max_steps=1)
    trainer.fit(TinyModule(), loader())
    trainer.save_checkpoint(root / "file.ckpt")
    messages = {}
    names = ["__0_0.distcp", "__1_0.distcp", ".metadata", "meta.pt", "ranks.pt", "manifest.json"]
    damages: list[tuple[str, Callable[[Path], None]]] = [("cut", _truncate), ("flip", _flip), ("gone", os.unlink)]
    for kind, damage in damages:
        for name in names:
            messages[f"{kind} {name}"] = _fit_from(root, good, name, damage)
        if kind != "gone":
            messages[f"{kind} file.ckpt"] = _fit_from(root, root / "file.ckpt", "", damage)
    messages["nothing"] = _fit_from(root, root / "nothing.ckpt", "", lambda _: None)
    resumed = quiet(root, max_steps=2)
    resumed.fit(TinyModule(), loader(), ckpt_path=good)
    assert resumed.global_step == 2
    return messages


def _fit_from(root: Path, source: Path, name: str, damage: Callable[[Path], None]) -> str:
    import torch.distributed as dist

    broken = root / "broken.ckpt"
    if dist.get_rank() == 0 and source.exists():
        files.delete(broken)
        shutil.copytree(source, broken) if source.is_dir() else shutil.copy(source, broken)
        damage(broken / name if name else broken)
    dist.barrier()
    module = TinyModule()
    with pytest.raises(CheckpointError) as caught:
        quiet(root, max_steps=2).fit(module, loader(), ckpt_path=broken if source.exists() else source)
    dist.barrier()
    return str(caught.value)


def test_damage_is_named_on_every_rank(tmp_path: Path) -> None:
    one, other = run_ranks(2, _load_damaged, tmp_path, init_process_group=False)
    assert one == other
    for case, message in one.items():
        name = case.split()[-1].replace("file.ckpt", "broken.ckpt")
        assert name in message, f"{case}: {message}"
        if case.startswith("gone"):
            assert "missing" in message
        elif name.endswith((".distcp", ".pt", ".metadata")):
            assert ("bytes instead of" if case.startswith("cut") else "checksum") in message
    assert len(one) == 3 * 6 + 2 + 1


def test_a_replacement_that_was_interrupted_is_found(tmp_path: Path) -> None:
    other = tmp_path / "last.replaced-0123.ckpt"
    other.mkdir()
    assert files.find(tmp_path / "last.ckpt") == other
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*best\.ckpt"):
        files.find(tmp_path / "best.ckpt")
    (tmp_path / "link.ckpt").symlink_to("elsewhere")
    with pytest.raises(FileNotFoundError, match="points to elsewhere, which does not exist"):
        files.find(tmp_path / "link.ckpt")


# ---------------------------------------------------------------------------------------------------- names


def _make(path: Path, kind: str, text: str) -> Path:
    if kind == "directory":
        path.mkdir()
        (path / "content").write_text(text)
    elif kind == "file":
        path.write_text(text)
    elif kind == "link":
        (path.parent / "target").mkdir(exist_ok=True)
        path.symlink_to("target")
    return path


@pytest.mark.parametrize("suffix", [".ckpt", ""])
@pytest.mark.parametrize("before", ["nothing", "file", "directory", "link"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_publish_replaces_whatever_was_there(tmp_path: Path, kind: str, before: str, suffix: str) -> None:
    final = _make(tmp_path / f"last{suffix}", before, "old")
    if kind == "directory" == before:
        _make(tmp_path / f"last.replaced-0123{suffix}", kind, "of a job that was killed")
    files.publish(_make(files.hidden(final), kind, "new"), final)
    assert not final.is_symlink()
    assert (final / "content" if kind == "directory" else final).read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} <= {final.name, "target"}
    assert before != "link" or (tmp_path / "target").is_dir()


def test_links_move_atomically_and_before_their_target_goes(tmp_path: Path) -> None:
    one, two = (_make(tmp_path / name, "directory", name) for name in ("one.ckpt", "two.ckpt"))
    last = tmp_path / "last.ckpt"
    files.point(last, one)
    assert os.readlink(last) == "one.ckpt"
    assert files.links_to(one) == [last]
    files.point(last, two)
    assert last.resolve() == two
    assert files.links_to(one) == []
    files.point(_make(tmp_path / "old-last.ckpt", "directory", "x"), two)
    assert (tmp_path / "old-last.ckpt").is_symlink()
    files.withdraw(one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "old-last.ckpt", "two.ckpt"]


@pytest.mark.parametrize("suffix", [".ckpt", ""])
def test_a_link_leads_to_a_checkpoint_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Lightning's `ckpt_path="last"` starts anew where `last.ckpt` is gone or leads nowhere: a job may end any time."""
    final, last, found = tmp_path / f"model{suffix}", tmp_path / "last.ckpt", []

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def changes(*args: Any) -> None:
            change(*args)
            if final.exists() or found:
                found.append((last / "content").read_text() if last.exists() else None)

        return changes

    files.publish(_make(files.hidden(final), "directory", "old"), final)
    files.point(last, final)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    files.publish(_make(files.hidden(final), "directory", "new"), final)
    files.point(last, final)
    assert len(found) > 2
    assert None not in found
    assert found[-1] == "new"
    assert {path.name for path in tmp_path.iterdir()} == {final.name, "last.ckpt"}


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(11))
def test_the_next_save_tidies_up_wherever_a_job_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    final, last, steps = tmp_path / "model.ckpt", tmp_path / "last.ckpt", iter(range(11))

    def until_killed(change: Callable[..., None]) -> Callable[..., None]:
        def changes(*args: Any) -> None:
            if next(steps) == step:
                raise _Killed
            change(*args)

        return changes

    files.publish(_make(files.hidden(final), "directory", "old"), final)
    files.point(last, final)
    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "symlink"):
            patch.setattr(os, name, until_killed(getattr(os, name)))
        with pytest.raises(_Killed) if step < 10 else contextlib.nullcontext():
            files.publish(_make(files.hidden(final), "directory", "new"), final)
    assert (last / "content").read_text() in ("old", "new")
    assert (files.find(final) / "content").read_text() in ("old", "new")
    for path in (final, last):
        files.remove_leftovers(path)
    files.publish(_make(files.hidden(final), "directory", "next"), final)
    assert (last / "content").read_text() == "next", "not what it was led to while its target had no name"
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", "last.ckpt"}


def test_a_directory_that_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    empty, own, theirs = (tmp_path / name for name in ("empty", "own.ckpt", "runs"))
    for path in (empty, own, theirs):
        path.mkdir()
    (own / files.MANIFEST).touch()
    (theirs / "results.csv").touch()
    for path in (empty, own, tmp_path / "new.ckpt"):
        files.refuse_foreign_directory(path)
    with pytest.raises(FileExistsError, match=r"runs is a directory with other things in it \(results\.csv\)"):
        files.refuse_foreign_directory(theirs)


@pytest.mark.parametrize("address", ["s3://bucket/a.ckpt", Path("s3://bucket/a.ckpt"), "gs://bucket", "https://host/a"])
def test_addresses_that_are_no_paths_are_refused(address: str | Path) -> None:
    with pytest.raises(ValueError, match="mount the storage"):
        files.local_path(address)
    assert files.local_path("runs/step=3-loss:1.ckpt") == Path("runs/step=3-loss:1.ckpt")


def test_leftovers_go_and_other_jobs_stay(tmp_path: Path) -> None:
    final, other = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    mine, running, stale = files.hidden(final), files.hidden(other), files.hidden(other)
    for path in (mine, running, stale):
        path.mkdir()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(stale, (long_ago, long_ago))
    files.remove_leftovers(final)
    assert [path for path in (mine, running, stale) if path.exists()] == [running]
    assert "ckpt_" not in running.name
    assert not running.name.startswith("last")


def test_the_manifest_says_what_was_written(tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    with files.ChecksumFile(tmp_path / "data") as file:
        for start in range(0, len(data), 1 << 19):
            file.write(memoryview(data)[start : start + (1 << 19)])
    assert file.record == files.FileRecord(len(data), zlib.crc32(data)) == files.checksum(tmp_path / "data")
    files.write_manifest(tmp_path, {"data": file.record})
    assert files.read_manifest(tmp_path) == {"data": file.record}
    assert files.damage(tmp_path, files.read_manifest(tmp_path)) == []
    with pytest.raises(FileNotFoundError, match="a file system that all nodes share"):
        files.write_manifest(tmp_path, {"elsewhere": file.record})


# ---------------------------------------------------------------------------------------------------- jobs


def test_jobs_after_a_failed_one_are_dropped_until_it_is_told() -> None:
    queue, ran = JobQueue(Worker()), []

    def fail() -> None:
        raise OSError("planted")

    queue.submit(lambda: ran.append(1))
    queue.submit(fail)
    queue.submit(lambda: ran.append(2))
    with pytest.raises(OSError, match="planted"):
        queue.wait()
    assert not queue.busy
    queue.submit(lambda: ran.append(3))
    queue.wait()
    assert ran == [1, 3]


def test_an_error_is_told_once_and_to_its_own_queue() -> None:
    def fail() -> None:
        raise OSError("planted")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # one was told again in a third of the rounds while dropped jobs had not ended
    try:
        worker = Worker()
        queue, other = JobQueue(worker), JobQueue(worker)
        for _ in range(200):
            queue.submit(fail)
            queue.submit(lambda: None)
            other.submit(lambda: None)
            worker.wait()
            other.wait()
            with pytest.raises(OSError, match="planted"):
                queue.wait()
            queue.wait()
    finally:
        sys.setswitchinterval(interval)


# ---------------------------------------------------------------------------------------------------- host copies


def _copies(device: torch.device) -> None:
    buffer = HostBuffer()
    for size in (5, 1000, 3):
        tensors = {
            "fp32": torch.randn(size, 3, device=device),
            "bf16": torch.randn(size, device=device).bfloat16(),
            "int64": torch.arange(size, device=device),
            "step": torch.tensor(7.0),
            "none": torch.empty(0, 4, device=device),
            "columns": torch.randn(4, size, device=device).t(),
        }
        copies = buffer.copy(tensors)
        expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        for tensor in tensors.values():
            tensor.zero_()  # what training does to them afterwards
        for name, copy in copies.items():
            assert copy.device.type == "cpu"
            assert copy.dtype == expected[name].dtype
            assert torch.equal(copy, expected[name]), name
            assert copy.is_pinned() is (device.type == "cuda") or copy.numel() == 0


def test_copies_on_the_host_do_not_change() -> None:
    _copies(torch.device("cpu"))


@pytest.mark.gpu
def test_copies_of_a_gpu_are_page_locked() -> None:
    _copies(torch.device("cuda"))


# ---------------------------------------------------------------------------------------------------- pickles


class _Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


class _Settings:
    pass


def _load_strange(root: Path) -> dict[str, str]:
    class WithObject(TinyModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["settings"] = _Settings()

    class WithShards(TinyModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["average"] = {"head": self.model.lm_head.weight}

    messages = {}
    for distributed in (True, False):
        path = root / f"object-{distributed}.ckpt"
        strategy = ExpertParallelStrategy(ep=2, save_distributed_checkpoint=distributed)
        trainer = quiet(root, strategy=strategy, max_steps=1)
        trainer.fit(WithObject(), loader())
        trainer.save_checkpoint(path)
        for value in (None, True):
            with pytest.raises(CheckpointError) as caught:
                quiet(root, max_steps=2).fit(WithObject(), loader(), ckpt_path=path, weights_only=value)
            messages[f"object {distributed} {value}"] = str(caught.value)
        trusting = quiet(root, max_steps=2)
        trusting.fit(WithObject(), loader(), ckpt_path=path, weights_only=False)
        assert trusting.global_step == 2
    fitted = quiet(root, max_steps=1)
    fitted.fit(WithShards(), loader())
    with pytest.raises(CheckpointError) as caught:
        fitted.save_checkpoint(root / "shards.ckpt")
    messages["shards"] = str(caught.value)
    return messages


def test_objects_are_loaded_only_when_asked_for(tmp_path: Path) -> None:
    messages = run_ranks(2, _load_strange, tmp_path, init_process_group=False)[0]
    assert "checkpoint['average']['head'] is a sharded tensor" in messages.pop("shards")
    for case, message in messages.items():
        assert "weights_only=False" in message, case
        assert "_Settings" in message, message


def test_the_index_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_ep.checkpoint.tensor_files import SafeReader

    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir.*may run code"):
        SafeReader(tmp_path).read_metadata()
    assert not (tmp_path / "evil").exists()


def test_generators_of_random_numbers_come_back() -> None:
    import random

    import numpy as np

    from lightning_ep.checkpoint.metadata import random_state, serialize, set_random_state

    def draw() -> tuple[Any, ...]:
        return random.gauss(0, 1), float(np.random.normal()), torch.rand(2).tolist()

    draw()  # leaves half of a pair of Gaussian numbers behind
    device = torch.device("cpu")
    saved = torch.load(io.BytesIO(serialize(random_state(device))), weights_only=True)
    expected = [draw() for _ in range(3)]
    set_random_state(saved, device)
    assert [draw() for _ in range(3)] == expected


def test_a_file_keeps_a_learning_rate_that_changes_while_it_is_written() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(0.1))
    kept = gather_optimizer(optimizer, keep=True)
    optimizer.param_groups[0]["lr"].mul_(0.5)
    assert kept["param_groups"][0]["lr"] == pytest.approx(0.1)


class _ByGetattr:
    """Pickled as Python 3.11.2 pickles the members of enumerations."""

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)


def test_members_of_enumerations_are_no_code(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

    from lightning_ep.checkpoint.tensor_files import SafeReader

    member = _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_ByGetattr(_MEM_FORMAT_ENCODING, member.name)))
    assert SafeReader(tmp_path).read_metadata() is member
    for owner, name in ((torch.Size, "__init__"), (_MEM_FORMAT_ENCODING, "__class__")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(_ByGetattr(owner, name)))
        with pytest.raises(CheckpointError, match="may run code"):
            SafeReader(tmp_path).read_metadata()
