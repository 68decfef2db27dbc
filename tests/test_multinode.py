"""More than one node: two network namespaces with a torchrun each, and what the launchers' settings must agree on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lightning_ep import ExpertParallelStrategy
from tests.nodes import TwoNodes, why_not
from tests.parity import LR, compare_with_one_process
from tests.ranks import run_ranks
from tests.reference import batches, tiny_model, train
from tests.tiny import quiet

two_nodes = pytest.mark.skipif(why_not() is not None, reason=f"no two nodes here: {why_not()}")

# ------------------------------------------------------------------ torchrun on two nodes


class _Job:
    """One script under torchrun on both nodes."""

    def __init__(self, nodes: TwoNodes, folder: Path, script: str) -> None:
        self.nodes, self.folder = nodes, folder
        (folder / "job.py").write_text(textwrap.dedent(script))

    def start(self, per_node: int = 1, max_restarts: int = 0, **environment: str) -> list[subprocess.Popen[bytes]]:
        common = ["--nnodes=2", f"--nproc-per-node={per_node}", f"--max-restarts={max_restarts}", "--rdzv-id=job",
                  "--rdzv-backend=c10d", f"--rdzv-endpoint={self.nodes.addresses[0]}:29500"]  # fmt: skip
        return [
            self.nodes.start(
                node,
                # The nodes share a host name, by which torchrun would find out where it hosts the rendezvous.
                [sys.executable, "-m", "torch.distributed.run", *common, f"--rdzv-conf=is_host={int(node == 0)}",
                 f"--local-addr={address}", str(self.folder / "job.py"), str(self.folder)],
                self.folder / f"output-{node}",
                PYTHONPATH=str(Path(__file__).resolve().parents[1]),
                OMP_NUM_THREADS="1",
                NODE=str(node),
                **environment,
            )
            for node, address in enumerate(self.nodes.addresses)
        ]  # fmt: skip

    def output(self) -> str:
        return "\n".join((self.folder / f"output-{node}").read_text(errors="replace") for node in range(2))


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    with TwoNodes() as nodes:
        yield nodes


_PARITY = """
    import json, os, sys
    from pathlib import Path
    import torch
    from lightning_ep import ParallelLayout
    from tests.parity import compare_with_one_process

    torch.manual_seed(0)
    case = {"causal": False, "accumulate": 1, "clip": 0.2}
    wrong = {ep: compare_with_one_process({"ep": ep}, [case]) for ep in ("auto", 4)}
    found = {"node": os.environ["NODE"], "local": os.environ["LOCAL_RANK"], "wrong": wrong}
    Path(sys.argv[1], f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))
"""


@two_nodes
@pytest.mark.slow
def test_training_on_two_nodes_equals_one_process(nodes: TwoNodes, tmp_path: Path) -> None:
    job = _Job(nodes, tmp_path, _PARITY)
    assert [process.wait(100) for process in job.start(per_node=2)] == [0, 0], job.output()
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert [(rank["node"], rank["local"]) for rank in ranks] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
    assert [rank["wrong"] for rank in ranks] == [{"auto": [], "4": []}] * 4
    # Only ep=4 crosses: two ranks of the other node, rows of 32 numbers, 4 times.
    warnings = [line for line in job.output().splitlines() if "cross nodes" in line]
    assert len(warnings) == 1
    for words in ("ranks 0 to 3", "up to 2 rows of 0.0625 KiB", "up to 0.5 KiB per token", "(here 2)"):
        assert words in warnings[0]


STEPS = 14
_RESTARTS = """
    import operator, os, signal, sys, time
    from pathlib import Path
    import torch.distributed as dist
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_ep import ExpertParallelStrategy
    from lightning_ep.data import ResumableLoader, data_ranks
    from tests.parity import UserModule
    from tests.reference import batches
    from tests.test_multinode import STEPS
    from tests.tiny import quiet

    root, first = Path(sys.argv[1]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    class Module(UserModule):
        def train_dataloader(self):
            rank, world = data_ranks(self.trainer)
            return ResumableLoader(batches(2 * STEPS, size=2), 1, rank, world, collate_fn=operator.itemgetter(0))

        def training_step(self, batch, batch_idx):
            time.sleep(0.1)
            step = self.trainer.global_step
            if first and str(step) == os.environ.get("DIE_AT"):
                if self.global_rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                # The other node's torchrun hears of the restart before its own worker fails.
                time.sleep(3)
            loss = super().training_step(batch, batch_idx)
            mean = loss.detach() / self.trainer.world_size
            dist.all_reduce(mean)
            if self.global_rank == 0:
                with open(root / "losses", "a") as file:
                    file.write(f"{os.getpid()} {step} {mean.item()}\\n")
            return loss

    keep = ModelCheckpoint(root / "saved", every_n_train_steps=1, save_last="link")
    quiet(root, strategy=ExpertParallelStrategy(ep=2), devices=1, num_nodes=2, max_steps=STEPS, callbacks=[keep]).fit(
        Module(), ckpt_path="last"
    )
"""


@two_nodes
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_dies_the_other_ends_and_a_restart_goes_on(nodes: TwoNodes, tmp_path: Path) -> None:
    """First the node without, then the node with torchrun's rendezvous, then one worker that torchrun restarts."""
    job = _Job(nodes, tmp_path, _RESTARTS)
    expected = _losses_of_one_process()
    for victim in (1, 0):
        processes = job.start()
        before = len(_read_losses(tmp_path))
        while len(_read_losses(tmp_path)) < before + 3:
            assert all(process.poll() is None for process in processes), job.output()
            time.sleep(0.05)
        nodes.kill(processes[victim])
        assert processes[1 - victim].wait(30) != 0
    before = len(_read_losses(tmp_path))
    processes = job.start(max_restarts=1, DIE_AT=str(STEPS - 2), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    # Workers import torch twice, on two cores that other tests may be using.
    assert [process.wait(180) for process in processes] == [0, 0], job.output()

    found = _read_losses(tmp_path)
    for _, step, loss in found:
        assert loss == pytest.approx(expected[step], rel=1e-5)
    steps = [step for _, step, _ in found]
    assert set(steps) == set(range(STEPS))
    assert steps.count(0) == 1, "every start but the first goes on"
    assert len({process for process, _, _ in found[before:]}) == 2, "torchrun has restarted its workers"


def _read_losses(folder: Path) -> list[tuple[int, int, float]]:
    """Per line: the process of rank 0, the step, the mean loss of all ranks."""
    if not (folder / "losses").exists():
        return []
    lines = [line.split() for line in (folder / "losses").read_text().splitlines()]
    return [(int(process), int(step), float(loss)) for process, step, loss in lines]


def _losses_of_one_process() -> list[float]:
    flat = batches(2 * STEPS, size=2)
    windows = [flat[2 * step : 2 * step + 2] for step in range(STEPS)]
    return train(tiny_model(), windows, LR, None, token_weighted=False)["losses"]


# ------------------------------------------------------------------ SLURM, without one


def _slurm(rank: int, tasks: int, per_node: int, **changes: str) -> dict[str, str]:
    """What srun sets for a task, and the torchrun variables of `tests.ranks` as srun leaves them: unset."""
    variables = {"JOB_ID": "4711", "JOB_NAME": "train", "NTASKS": str(tasks), "NTASKS_PER_NODE": str(per_node),
                 "NNODES": str(tasks // per_node), "PROCID": str(rank), "LOCALID": str(rank % per_node),
                 "NODEID": str(rank // per_node)}  # fmt: skip
    return {f"SLURM_{name}": value for name, value in {**variables, **changes}.items()}


def _train_under_slurm() -> list[Any]:
    os.environ.update(_slurm(int(os.environ["RANK"]), 4, 2), LOCAL_WORLD_SIZE="2")
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "GROUP_RANK"):
        del os.environ[name]
    wrong = compare_with_one_process({}, [{"causal": True, "accumulate": 1, "clip": 0.2}])
    trainer = quiet(Path(), strategy=ExpertParallelStrategy(), devices=2, num_nodes=2)
    assert isinstance(trainer.strategy.cluster_environment, SLURMEnvironment)
    return [wrong, trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.strategy.layout.ep]


def test_training_under_srun_equals_one_process() -> None:
    found = run_ranks(4, _train_under_slurm, init_process_group=False)
    assert found == [[[], rank, rank % 2, rank // 2, 2] for rank in range(4)]


# ------------------------------------------------------------------ what does not fit together


def _torchrun(rank: int, world: int, per_node: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank % per_node), "GROUP_RANK": str(rank // per_node),
            "LOCAL_WORLD_SIZE": str(per_node), "WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip


_FIX = r"Use Trainer\(devices=2, num_nodes=2\)"


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "message"),
    [
        # num_nodes forgotten, under either launcher
        (_torchrun(0, 4, 2), 2, 1, f"means 2 processes, 2 on .*TorchElastic started 4, of which 2 .*{_FIX}"),
        (_slurm(0, 4, 2), 2, 1, f"means 2 processes, 2 on .*SLURM started 4, of which 2 .*{_FIX}"),
        # as many in all, but not on every node
        (_torchrun(0, 4, 2), 4, 1, f"means 4 processes, 4 on .*started 4, of which 2 .*{_FIX}"),
        (_slurm(0, 4, 2), 1, 4, f"means 4 processes, 1 on .*started 4, of which 2 .*{_FIX}"),
        # a torchrun on every node that knows of one node
        (_torchrun(0, 2, 2), 2, 2, r"2 on every node, .*started 2, of which 2 .*devices=2, num_nodes=1\).*--nnodes"),
        # nodes of different sizes
        (_torchrun(0, 3, 2), 2, 2, r"started 3, of which 2 .*Start as many processes on every node"),
        # ranks dealt out one node at a time
        (_slurm(1, 4, 2, LOCALID="0", NODEID="1"), 2, 2, "Rank 1 is process 0 of node 1, where rank 2 .*=block"),
        # no launcher
        ({}, 2, 2, "without MASTER_ADDR, MASTER_PORT, NODE_RANK in .*torchrun --nnodes=2"),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, 2, 2, "without NODE_RANK in the environment"),
    ],
)  # fmt: skip
def test_a_trainer_that_disagrees_with_its_launcher(
    environment: dict[str, str], devices: int, num_nodes: int, message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        L.Trainer(
            strategy=ExpertParallelStrategy(), accelerator="cpu", devices=devices, num_nodes=num_nodes, logger=False
        )


def test_nodes_that_the_user_starts_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    trainer = quiet(tmp_path, strategy=ExpertParallelStrategy(), devices=2, num_nodes=2)
    assert (trainer.global_rank, trainer.strategy.layout.ep, trainer.strategy.layout.fsdp) == (2, 2, 2)
