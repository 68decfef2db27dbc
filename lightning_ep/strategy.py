"""ExpertParallelStrategy: where Lightning's lifecycle meets the sharded model."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.distributed import ReduceOp
from torch.distributed.tensor.parallel import ParallelStyle
from torch.optim import Optimizer
from typing_extensions import override

from lightning_ep import transformers_adapter as adapter
from lightning_ep.checkpoint.files import local_path
from lightning_ep.checkpoint.loop_state import forget_early_loaders, resume_accumulation
from lightning_ep.checkpoint.run import RunCheckpoints
from lightning_ep.context_parallel import shard_sequence
from lightning_ep.distributed.apart import ApartError, Watch
from lightning_ep.distributed.progress import Progress
from lightning_ep.fsdp.accumulation import forget_gradients, set_gradient_sync
from lightning_ep.fsdp.groups import own_master_weights
from lightning_ep.fsdp.optional_parts import OptionalParts, parts_in
from lightning_ep.hub.initialize import has_meta_tensors, materialize
from lightning_ep.hub.load import stream_pretrained
from lightning_ep.layers.recompute import ActivationCheckpointing, check_mode
from lightning_ep.layout import Meshes, ParallelLayout
from lightning_ep.moe.master_weights import ModelMasterWeights
from lightning_ep.moe.own_plan import check_plan, has_experts, resolve_plan
from lightning_ep.parallelize import check_sharded, is_parallelized, shard
from lightning_ep.process_groups import one_worker_per_gloo_group
from lightning_ep.trainer import grad_norm as grad_norm  # teaches it shards
from lightning_ep.trainer.adamw import AdamW
from lightning_ep.trainer.batches import Batches, check_shared_batches
from lightning_ep.trainer.clipping import clip_grad_norm_
from lightning_ep.trainer.cost_warnings import warn_if_ep_crosses_nodes, warn_if_large_in_memory
from lightning_ep.trainer.finetuning import KnownParameters
from lightning_ep.trainer.garbage import spare_collections
from lightning_ep.trainer.loaders import prepare_loader
from lightning_ep.trainer.lost_hooks import check_hooks_before_sharding, check_hooks_on_shards
from lightning_ep.trainer.memory_advice import add_memory_advice
from lightning_ep.trainer.nonfinite import NonfiniteGuard
from lightning_ep.trainer.precision import ShardedPrecision
from lightning_ep.trainer.ready_optimizers import prepare_optimizers
from lightning_ep.trainer.refusals import refuse_other_processes, refuse_unsupported
from lightning_ep.trainer.schedules import tell_total_steps
from lightning_ep.trainer.signals import AgreeOnSignals, Interrupted
from lightning_ep.trainer.start_table import say_start
from lightning_ep.trainer.steering import CheckMonitored

_TIMEOUT = timedelta(minutes=30)  # Lightning's default


class ExpertParallelStrategy(ModelParallelStrategy):
    """Expert parallelism for mixture-of-experts transformers, with FSDP2 around everything.

    Experts are split over groups of ``ep`` ranks and reached by all-to-all; everything else is sharded over all ranks.
    Models come from ``configure_model`` or ``__init__`` of the LightningModule, unchanged.

    Args:
        ep: Ranks that share one set of experts. ``"auto"``: the processes of a node.
        fsdp: Ranks over which each expert's matrices are sharded. ``"auto"``: all that ``ep`` and ``replicate`` leave.
        replicate: Copies of the sharded model, whose gradients are all-reduced: shards stay inside a copy, a node for
            example, and only gradients cross.
        tp: Ranks that share the matrices of attention, dense MLPs and the vocabulary, and see the same batch. Bound by
            the model's key/value heads, which ``ep`` is not.
        cp: Ranks that share every sequence: each computes with a piece of the tokens and, in attention, with all tokens
            of some heads. Must divide the attention heads and ``ep * fsdp``; the ranks get the same batch. `CausalLM`
            splits it; a module of yours passes `shard_sequence` of it to its model.
        plan: Expert plan: ``"experts"`` by the name of a module whose parameters have the experts in front, or by a
            pattern such as ``"model.layers.*.moe.experts"``; or what `expert_plan` returns. Default: the model's own.
        experts_implementation: Kernel for the experts of one rank: ``"fused"`` (ours), ``"eager"`` or any name
            registered in transformers' ``ExpertsInterface``. ``"auto"``: the fused one where it can serve the experts.
            A name that the model's config has, or gets later, is not asked.
        activation_checkpointing: What backward computes again to save memory. ``"none"``: nothing. ``"selective"``: the
            decoder layers, but neither their routing nor their experts, whose received rows are kept. ``"full"``: only
            each layer's input and routing are kept; rows travel once more and the experts' up projection is repeated.
        compile: Compile every decoder layer with `torch.compile`; its experts and collectives run as they are.
        skip_nonfinite_steps: Leave out a step whose gradient norm is not finite, on all ranks, at most so many in a
            row; the next one raises a RuntimeError. 0: such a step is taken. The host waits for the norm of every step.
        save_distributed_checkpoint: Save a directory to which every rank writes its shards, or (False) one file that
            rank 0 assembles.
        async_save: Copy what a checkpoint holds to host memory and write it behind the training, one checkpoint at a
            time. Training waits for the copy; each rank needs host memory for its part.
        process_group_backend: ``torch.distributed`` backend. Default: NCCL on GPUs, gloo on CPUs.
        timeout: Time after which a collective that does not finish ends the job.
    """

    def __init__(
        self,
        ep: int | Literal["auto"] = "auto",
        fsdp: int | Literal["auto"] = "auto",
        replicate: int = 1,
        tp: int = 1,
        cp: int = 1,
        plan: dict[str, str | ParallelStyle] | None = None,
        experts_implementation: str = "auto",
        activation_checkpointing: ActivationCheckpointing = "none",
        compile: bool = False,
        skip_nonfinite_steps: int = 0,
        save_distributed_checkpoint: bool = True,
        async_save: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = _TIMEOUT,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._ep = ep
        self._fsdp = fsdp
        self._replicate = replicate
        self._tp = tp
        self._cp = cp
        self._batches = Batches()
        self._plan = plan
        self._experts_implementation = experts_implementation
        self._recompute = activation_checkpointing
        self._compile = compile
        self._guard = NonfiniteGuard(skip_nonfinite_steps)
        self._layout: ParallelLayout | None = None
        self._meshes: Meshes | None = None
        self._masters: ModelMasterWeights | None = None
        self._optional_parts: list[OptionalParts] = []
        self._hooks_checked = False
        self._progress = Progress()
        self._refusal: ValueError | FileExistsError | None = None
        self._async_save = async_save
        self._checkpoints: RunCheckpoints | None = None
        self._signals: AgreeOnSignals | None = None
        self._monitored = CheckMonitored()
        self._known_parameters = KnownParameters()
        if "pytorch_lightning" in sys.modules:
            rank_zero_warn(
                "`pytorch_lightning` is imported beside `lightning`. Its Trainer does not know this strategy and calls "
                "it invalid: use `from lightning.pytorch import Trainer`."
            )

    # ------------------------------------------------------------------ layout

    @property
    def layout(self) -> ParallelLayout:
        """The sizes of the parallel dimensions; known once the Trainer has been built."""
        if self._layout is None:
            raise RuntimeError("The layout is known once the strategy has been passed to a Trainer.")
        return self._layout

    @property
    def data_rank(self) -> int:
        """This rank's index among the ranks that see different batches."""
        return self.layout.data_rank(self.global_rank)

    @property
    def data_world_size(self) -> int:
        """Number of ranks that see different batches."""
        return self.layout.data_world_size

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.lightning_module is not None and self.lightning_module.trainer.predicting:
            # All samples: Lightning's sampler for predict asserts one for every rank. `process_dataloader` shares them.
            return {"num_replicas": 1, "rank": 0}
        return {"num_replicas": self.data_world_size, "rank": self.data_rank}

    @property
    @override
    def precision_plugin(self) -> ShardedPrecision:
        plugin = self._precision_plugin or ShardedPrecision()
        assert isinstance(plugin, ShardedPrecision)
        return plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        # The Trainer builds a plugin for `precision=...` without asking the strategy; ours takes its place.
        if plugin is not None and not isinstance(plugin, ShardedPrecision):
            plugin = ShardedPrecision(plugin.precision)  # type: ignore[arg-type]
        if plugin is not None:
            plugin.guard = self._guard
        self._precision_plugin = plugin

    @property
    def skipped_steps(self) -> int:
        """Number of steps that were left out since the strategy was made, with ``skip_nonfinite_steps``."""
        return self._guard.skipped

    # ------------------------------------------------------------------ processes

    @override
    def _configure_launcher(self) -> None:
        # The earliest place that knows the number of processes: before any of them is launched.
        assert self.cluster_environment is not None
        check_mode(self._recompute)
        check_plan(self._plan, self._experts_implementation)
        self._guard.check()
        expected = self.num_nodes * self.num_processes
        refuse_other_processes(self.cluster_environment, self.num_processes, self.num_nodes)
        self._layout = ParallelLayout.resolve(
            self._ep, self._fsdp, expected, self.num_processes, self._replicate, self._tp, self._cp
        )
        if expected > 1:
            # A single process needs no launcher, so that notebooks can use the strategy.
            super()._configure_launcher()

    @override
    def setup_environment(self) -> None:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        try:
            refuse_unsupported(trainer, self._layer_sync)
        except (ValueError, FileExistsError) as refusal:
            self._refusal = refusal
            raise
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            # FSDP2 keeps the buffers of its first gather: as inference tensors they could not be written again, or
            # saved for backward. Lightning does the same for its own FSDP strategy, and wherever gloo is used.
            loop.inference_mode = False
        if self._meshes is None:
            _set_num_threads_if_needed(self.num_processes)  # Lightning: not where others have launched the processes
            one_worker_per_gloo_group(self.root_device.type)
            self._setup_distributed()
            self._meshes = self.layout.build_meshes(self.root_device.type)
            self._device_mesh = self._meshes.expert
            if self.layout.world_size > 1 and dist.get_backend() != "fake":  # which has no others to wait for
                Watch(self._progress)
            if self.root_device.type == "cuda" and self._timeout is not None:
                self._progress.watch(self.global_rank, self._timeout.total_seconds())
            self._checkpoints = RunCheckpoints(
                self.layout,
                self.root_device,
                self.num_processes,
                self._timeout or _TIMEOUT,
                self._save_distributed_checkpoint,
                self._async_save,
            )
            self._signals = AgreeOnSignals(self._timeout or _TIMEOUT, self._checkpoints.at_once)
        assert self._signals is not None
        self._signals.watch(trainer)
        self._monitored.watch(trainer)
        self._known_parameters.begin(trainer)
        self._run.begin(trainer)
        self.lightning_module._device_mesh = self._device_mesh

    @override
    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException | Interrupted):
            return  # all ranks agreed to stop and have saved
        self._progress.say_failed(exception, self.global_rank, self.layout.world_size)
        add_memory_advice(exception, self.lightning_module, self.layout, self._recompute, self._compile, self._batches)
        if self._checkpoints is not None:
            self._checkpoints.fail()
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            # The other ranks may wait in a collective for this one until it times out.
            self.launcher.kill(signal.SIGKILL)
        if self._progress.verdict is not None:
            raise ApartError(self._progress.verdict) from exception

    # ------------------------------------------------------------------ model

    @contextmanager
    @override
    def model_sharded_context(self) -> Generator[None, None, None]:
        yield
        self._shard_model()

    def _shard_model(self) -> None:
        module = self.lightning_module
        assert module is not None
        assert self._meshes is not None
        if is_parallelized(module):  # by an earlier run, or the user
            check_sharded(module, self.layout)
            self.precision_plugin.check_sharded(module)
            return
        if not has_experts(module, self._plan):
            return  # the model comes later, at the latest in `setup`
        plan = resolve_plan(module, self._plan, self._experts_implementation, self._progress, is_called=False)
        warn_if_large_in_memory(module, self.layout, self.num_processes)
        check_hooks_before_sharding(module)
        self.precision_plugin.convert_module(module)
        warn_if_ep_crosses_nodes(module, self.layout, self.num_processes)
        policy = self.precision_plugin.mp_policy
        where = (self.layout, self._meshes, self.root_device)
        shard(module, *where, plan, policy, compile=self._compile, activation_checkpointing=self._recompute)
        self.precision_plugin.note_sharded(module)

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert self.accelerator is not None
        assert module is not None
        self.accelerator.setup(trainer)
        self._shard_model()
        if not is_parallelized(module):
            resolve_plan(module, self._plan)  # raises: there is no transformers model, nor what the plan names
        self._hooks_checked = False
        self._run.allocate(module)
        if has_meta_tensors(module):
            stream_pretrained(module, self.root_device)
            materialize(module, self.root_device, self._common_seed())
        self._optional_parts = parts_in(module)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            forget_gradients(module)
            self.setup_optimizers(trainer)
            prepare_optimizers(self.optimizers, module, self._common_seed)
            self._masters = own_master_weights(module, self.root_device)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
        self._run.restore(module)

    def _common_seed(self) -> int:
        seed = os.environ.get("PL_GLOBAL_SEED")
        return int(self.broadcast(seed if seed is not None else torch.initial_seed()))

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        # `load_checkpoint` reads what is no tensor; `setup` then fills the tensors. Afterwards Lightning 2.6 would
        # forget the user's `weights_only`.
        return False

    @property
    def _run(self) -> RunCheckpoints:
        if self._checkpoints is None:
            raise RuntimeError("Checkpoints are saved, loaded and removed once the Trainer has set up its processes.")
        return self._checkpoints

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self._refusal is not None:
            # A callback that saves on exceptions would hide the refusal behind an error of its own.
            raise self._refusal
        assert self.lightning_module is not None
        return self._run.weights(self.lightning_module)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._run.optimizer_state(self.lightning_module, optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError("storage_options has no meaning for ExpertParallelStrategy, which writes to mounted disks.")
        assert self.lightning_module is not None
        self._run.save(self.lightning_module, checkpoint, local_path(filepath))

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        self._run.remove(local_path(filepath))

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._run.open(self.lightning_module, local_path(checkpoint_path), weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        pass  # `setup` does it, once the model is sharded

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        # After `on_fit_start`, in which BaseFinetuning builds the groups again that it has added.
        assert self.lightning_module is not None
        forget_early_loaders(self.lightning_module.trainer)
        self._run.restore_optimizers(self.lightning_module)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        module = self.lightning_module
        assert module is not None
        self._run.before_batch(module.trainer)
        return self._batches.to_device(batch, module, device or self.root_device, dataloader_idx, self.layout.cp)

    def wait_for_checkpoints(self) -> None:
        """Returns once every checkpoint that was saved before is on the disk; of use with ``async_save=True``.

        Raises:
            CheckpointError: On every rank, if one could not be saved.
        """
        self._run.wait()

    @override
    def teardown(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.finish()
        if self._masters is not None:
            self._masters.end_run()
        self._monitored.release()
        self._known_parameters.end()
        super().teardown()

    # ------------------------------------------------------------------ data

    @override
    def process_dataloader(self, dataloader: object) -> object:
        assert self.lightning_module is not None
        ranks = (self.data_rank, self.data_world_size)
        loader = prepare_loader(dataloader, self.lightning_module, *ranks, self._run.loaders)
        self._run.before_epoch(self.lightning_module.trainer)
        return loader

    def shard_sequence(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """This rank's piece of a batch of whole sequences, for a transformers model under ``cp``.

        In a step of a LightningModule: ``loss = self.model(**self.trainer.strategy.shard_sequence(batch)).loss``. The
        mean of these losses over the ranks is that of the whole sequences, so they are returned and logged
        (``sync_dist=True``) as they are. With ``cp=1`` nothing is cut, and the loss is the same.

        Args:
            batch: As for `lightning_ep.shard_sequence`, where all that comes back is described. Split it in the step,
                not in a hook before: callbacks such as `Throughput` count the tokens of whole batches.

        Returns:
            Arguments for the model; all of them must reach it.
        """
        assert self._meshes is not None
        documents = self._batches.documents.of(*adapter.described(batch))
        return shard_sequence(batch, self._meshes.cp, documents, self._progress)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        """As Lightning's, but the mean of whole numbers is not rounded, and tensors may be on the CPU beside GPUs.

        With ``self.log(..., sync_dist=True)`` Lightning divides by the mean of the ranks' samples, 7.5 for 8 and 7, and
        leaves a value where it is, of which NCCL takes none that is on the CPU.
        """
        if isinstance(tensor, Tensor) and tensor.device.type != self.root_device.type:
            return self.reduce(tensor.to(self.root_device), group, reduce_op).to(tensor.device)
        means = reduce_op in ("mean", "avg", ReduceOp.AVG)
        if means and isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex()):
            tensor = tensor.to(torch.get_default_dtype())
        return super().reduce(tensor, group, reduce_op)

    # ------------------------------------------------------------------ steps

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        for begin in (self._run.before_training, resume_accumulation, tell_total_steps, spare_collections):
            begin(self.lightning_module.trainer)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._note_step("training")
        module = self.lightning_module
        assert module is not None
        if not self._hooks_checked:  # here, since hooks of all callbacks have had their turn
            check_hooks_on_shards(module)
            self._hooks_checked = True
            check_shared_batches(args[0] if args else None, self.layout)
            say_start(module, self.layout, self._recompute, self._compile, self._batches.shape)
        # Where something may be added to a gradient, it has the parameters' dtype from the start.
        alone = module.automatic_optimization and module.trainer.accumulate_grad_batches == 1
        assert self._masters is not None
        self._masters.begin_step(alone and all(isinstance(optimizer, AdamW) for optimizer in self.optimizers))
        return super().training_step(*args, **kwargs)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().optimizer_step(*args, **kwargs)
        assert self._masters is not None
        self._masters.end_step()
        return result

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._note_step("validation at training")
        return self._settled(super().validation_step(*args, **kwargs))

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._note_step("test at training")
        return self._settled(super().test_step(*args, **kwargs))

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._note_step("prediction at training")
        return self._settled(super().predict_step(*args, **kwargs))

    def _settled(self, output: STEP_OUTPUT) -> STEP_OUTPUT:
        for parts in self._optional_parts:
            parts.settle()
        return output

    def _note_step(self, stage: str) -> None:
        assert self.lightning_module is not None
        self._progress.begin_step(f"{stage} step {self.lightning_module.trainer.global_step}")

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        assert self.model is not None
        set_gradient_sync(self.model, False)
        try:
            yield
        finally:
            set_gradient_sync(self.model, True)

    def clip_grad_norm_(
        self,
        parameters: Iterable[Tensor] | None = None,
        max_norm: float = 1.0,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor:
        """Clips by global norm, exact across meshes; for manual optimization. Every rank must call it.

        Args:
            parameters: Parameters to clip. Default: all of the model.
            max_norm: The bound; ``inf`` only computes the norm.
            norm_type: The p of the p-norm.
            error_if_nonfinite: Raise if the norm is not finite.

        Returns:
            The norm before clipping, a 0-dim fp32 tensor.
        """
        assert self.model is not None
        params = self.model.parameters() if parameters is None else parameters
        return clip_grad_norm_(params, max_norm, norm_type, error_if_nonfinite)
