"""Names of torch, Lightning and transformers that are not their public API, and that this package uses.

An upgrade that moves one fails here with its name, instead of somewhere in a training run.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_ep

# "module:name", "module:Class.name"; an attribute that instances get in a method counts too.
PRIVATE = [
    "os:_exit",
    "sys:_current_frames",
    "sys:_getframe",
    "lightning.fabric.plugins.precision.utils:_DtypeContextManager",
    "lightning.fabric.plugins.precision.utils:_convert_fp_tensor",
    "lightning.fabric.utilities.data:_auto_add_worker_init_fn",
    "lightning.fabric.utilities.distributed:_set_num_threads_if_needed",
    "lightning.fabric.utilities.optimizer:_optimizers_to_device",
    "lightning.pytorch.callbacks:EarlyStopping._run_early_stopping_check",
    "lightning.pytorch.callbacks:ModelCheckpoint._get_metric_interpolated_filepath_name",
    "lightning.pytorch.callbacks:ModelCheckpoint._last_checkpoint_saved",
    "lightning.pytorch.callbacks:ModelCheckpoint._link_checkpoint",
    "lightning.pytorch.callbacks:ModelCheckpoint._monitor_candidates",
    "lightning.pytorch.callbacks:ModelCheckpoint._save_checkpoint",
    "lightning.pytorch.callbacks:ModelCheckpoint._save_last_checkpoint",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._get_monitor_value",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._should_check_val_fx",
    "lightning.pytorch.core.module:LightningModule._call_batch_hook",
    "lightning.pytorch.core.module:LightningModule._device_mesh",
    "lightning.pytorch.core.module:LightningModule._on_before_batch_transfer",
    "lightning.fabric.utilities.data:_set_sampler_epoch",
    "lightning.pytorch.loops.fit_loop:_FitLoop._combined_loader",
    "lightning.pytorch.loops.fit_loop:_FitLoop._combined_loader_states_to_load",
    "lightning.pytorch.utilities.combined_loader:CombinedLoader._mode",
    "lightning.pytorch.loops.loop:_Loop",
    "lightning.pytorch.loops.prediction_loop:_PredictionLoop._build_kwargs",
    "lightning.pytorch.loops.evaluation_loop:_EvaluationLoop._combined_loader",
    "lightning.pytorch.loops.prediction_loop:_PredictionLoop._combined_loader",
    "lightning.pytorch.trainer.trainer:Trainer._evaluation_loop",
    "lightning.pytorch.loops.prediction_loop:_PredictionLoop._build_step_args_from_hook_kwargs",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._batches_that_stepped",
    "lightning.pytorch.overrides.distributed:_IndexBatchSamplerWrapper._batch_sampler",
    "lightning.pytorch.loops.training_epoch_loop:_TrainingEpochLoop._broadcast_sigterm_tensor",
    "lightning.pytorch.plugins.precision:Precision._after_closure",
    "lightning.pytorch.plugins.precision:Precision._clip_gradients",
    "lightning.pytorch.strategies.launchers.subprocess_script:_SubprocessScriptLauncher.kill",
    "lightning.pytorch.strategies:ModelParallelStrategy._configure_launcher",
    "lightning.pytorch.strategies:ModelParallelStrategy._device_mesh",
    "lightning.pytorch.strategies:ModelParallelStrategy._layer_sync",
    "lightning.pytorch.strategies:ModelParallelStrategy._setup_distributed",
    "lightning.pytorch.strategies:ModelParallelStrategy._timeout",
    "lightning.pytorch.strategies:Strategy._precision_plugin",
    "lightning.pytorch.trainer.connectors.accelerator_connector:_AcceleratorConnector.use_distributed_sampler",
    "lightning.pytorch.trainer.trainer:Trainer._accelerator_connector",
    "lightning.pytorch.strategies:ModelParallelStrategy._save_distributed_checkpoint",
    "lightning.pytorch.trainer.connectors.signal_connector:_HandlersCompose",
    "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._get_current_signal_handlers",
    "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._has_already_handler",
    "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._original_handlers",
    "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._register_signal",
    "lightning.pytorch.trainer.connectors.signal_connector:_SignalConnector._slurm_sigusr_handler_fn",
    "lightning.pytorch.trainer.connectors.checkpoint_connector:_CheckpointConnector.hpc_save_path",
    "lightning.pytorch:Trainer._checkpoint_connector",
    "lightning.pytorch:Trainer._signal_connector",
    "torch:_foreach_add_",
    "torch:_foreach_clamp_max_",
    "torch:_foreach_clamp_min_",
    "torch:_foreach_copy_",
    "torch:_foreach_mul_",
    "torch:_foreach_norm",
    "torch:_fused_adamw_",
    "torch:_C._autograd._top_saved_tensors_default_hooks",
    "torch:_C._current_graph_task_id",
    "torch:_C._distributed_c10d.Backend.Options._timeout",
    "torch:_dynamo.maybe_mark_dynamic",
    "torch:_is_any_true",
    "torch:Tensor._backward_hooks",
    "torch:Tensor._post_accumulate_grad_hooks",
    "torch:Tensor._version",
    "torch.autograd:Variable._execution_engine",
    "torch.distributed:ProcessGroup._get_backend",
    "torch.distributed:ProcessGroupGloo._Options",
    "torch.distributed:ProcessGroupGloo._Options._devices",
    "torch.distributed:ProcessGroupGloo._Options._threads",
    "torch.distributed.fsdp:FSDPModule._get_fsdp_state",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam._module_info",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam._unsharded_param",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.unsharded_accumulated_grad",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._partial_reduce_output",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._training_state",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._all_gather_result",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup._wait_all_gather_streams_on_event",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._fsdp_param_group",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._is_root",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._init_shared_state",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._lazy_init",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._register_root_post_backward_final_callback",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._pre_forward",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._root_post_backward_final_callback",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._state_ctx",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPStateContext.iter_forward_root",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPStateContext.post_backward_final_callback_queued",
    "torch.distributed.utils:_apply_to_tensors",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._modules_to_run_forward",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._post_forward",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._post_forward_hook_handle",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._pre_backward",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState._pre_forward_hook_handle",
    "torch.distributed.checkpoint.filesystem:_StorageInfo",
    "torch.distributed.distributed_c10d:_get_default_group",
    "torch.distributed.distributed_c10d:_get_default_store",
    "torch.distributed.checkpoint.filesystem:_split_by_size_and_type",
    "torch.distributed.tensor.parallel:ParallelStyle._apply",
    "torch.nn:Module._apply",  # benchmarks
    "torch.distributed.tensor._dtensor_spec:TensorMeta._replace",
    "torch.distributed.tensor:DTensor._local_tensor",
    "torch.distributed.tensor:DTensor._spec",
    "torch.distributed.tensor.placement_types:_StridedShard",
    "torch.optim:AdamW._init_group",
    "torch.utils.data:DataLoader._index_sampler",
    "torch.utils.data:DataLoader._iterator",
    "torch.ops:_c10d_functional",
    "torch.nn:Module._backward_hooks",
    "torch.nn:Module._backward_pre_hooks",
    "torch.nn:Module._buffers",
    "torch.nn:Module._call_impl",
    "torch:_dynamo.config.nested_graph_breaks",
    "torch.nn:Module._compiled_call_impl",
    "torch.nn:Module._forward_hooks",
    "torch.nn:Module._forward_pre_hooks",
    "torch.nn:Module._modules",
    "torch.nn:Module._parameters",
    "transformers.masking_utils:find_packed_sequence_indices",
    "transformers:GenerationMixin._supports_mm_encoder_outputs",
    "transformers:PreTrainedModel._can_record_outputs",
    "transformers.utils.output_capturing:_CAN_RECORD_REGISTRY",
    "transformers:PreTrainedConfig._attn_implementation",
    "transformers:PreTrainedModel._from_config",
    "transformers:PreTrainedModel._init_added_embeddings_weights_with_mean",
    "peft.tuners.tuners_utils:BaseTunerLayer._disable_adapters",
    "peft.utils.other:AuxiliaryTrainingWrapper._disable_adapters",
    "transformers:PreTrainedModel._hf_peft_config_loaded",
    "transformers:PreTrainedModel._init_weights",
    "transformers:PreTrainedModel._keep_in_fp32_modules",
    "transformers:PreTrainedModel._keep_in_fp32_modules_strict",
    "transformers:PreTrainedModel._keys_to_ignore_on_load_missing",
    "transformers:PreTrainedModel._keys_to_ignore_on_load_unexpected",
    "transformers:PreTrainedModel._keys_to_ignore_on_save",
    "transformers:PreTrainedModel._no_split_modules",
    "transformers:PreTrainedModel._set_gradient_checkpointing",
    "transformers:PreTrainedModel._supports_attention_backend",
    "transformers.models.qwen3_moe.modeling_qwen3_moe:Qwen3MoeExperts._apply_gate",
    "transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe:Qwen3VLMoeTextModel._deepstack_process",
]

# Public in name, but undocumented, recent, or outside of what an upgrade promises to keep.
UNDOCUMENTED = [
    "peft.tuners.lora:ParamWrapper.get_param",
    "peft.tuners.lora:ParamWrapper.parameter_name",
    "peft.tuners.lora:ParamWrapper.scaling",
    "lightning.pytorch.overrides.distributed:UnrepeatedDistributedSampler",
    "lightning.pytorch.strategies:ModelParallelStrategy.model_sharded_context",
    "lightning.pytorch.strategies:Strategy.on_exception",
    "lightning.pytorch.trainer.states:TrainerFn.FITTING",
    "torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
    "torch.distributed.checkpoint.metadata:TensorStorageMetadata",
    "lightning.pytorch.callbacks:ModelCheckpoint.file_exists",
    "lightning.pytorch.strategies:ModelParallelStrategy.lightning_restore_optimizer",
    "lightning.pytorch.strategies:ModelParallelStrategy.restore_checkpoint_after_setup",
    "torch.distributed.checkpoint.api:CheckpointException.failures",
    "torch.distributed.checkpoint.default_planner:DefaultSavePlanner.lookup_object",
    "torch.distributed.checkpoint.filesystem:FileSystemWriter.write_data",
    "torch.serialization:get_unsafe_globals_in_checkpoint",
    "torch.distributed.fsdp:FSDPModule.set_force_sum_reduction_for_comms",
    "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor",
    "torch.distributed.fsdp:FSDPModule.set_requires_gradient_sync",
    "torch.distributed.fsdp:register_fsdp_forward_method",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_dtype_attrs",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.init_unsharded_param",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.orig_dtype",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.reduce_dtype",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.sharded_param",
    "torch.distributed.fsdp._fully_shard._fsdp_param:FSDPParam.to_accumulated_grad_if_needed",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.finalize_backward",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.post_backward",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.fsdp_params",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.is_unsharded",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.reduce_grads",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.reshard",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.unshard",
    "torch.distributed.fsdp._fully_shard._fsdp_param_group:FSDPParamGroup.wait_for_unshard",
    "torch.distributed.fsdp._fully_shard._fsdp_state:FSDPStateContext.all_states",
    "torch:_dynamo.config.skip_nnmodule_hook_guards",
    "torch.nn.attention.varlen:varlen_attn",
    "torch.nn.functional:grouped_mm",
    "torch.utils.weak:WeakIdRef",
    "torch.utils.weak:WeakTensorKeyDictionary",
    "torch.distributed.tensor.experimental:register_sharding",
    "transformers:PreTrainedModel.ep_plan",
    "transformers:PreTrainedConfig.attribute_map",
    "transformers.models.auto.processing_auto:PROCESSOR_MAPPING",
    "transformers.models.auto.processing_auto:processor_class_from_name",
    "transformers:ProcessorMixin.check_argument_for_proper_class",
    "transformers:ProcessorMixin.create_mm_token_type_ids",
    "transformers:ProcessorMixin.get_attributes",
    "transformers:ProcessorMixin.replace_audio_token",
    "transformers:ProcessorMixin.replace_image_token",
    "transformers:Qwen3VLMoeModel.get_rope_index",
    "transformers:Qwen3OmniMoeThinkerForConditionalGeneration.get_rope_index",
    "transformers:PreTrainedConfig.sub_configs",
    "transformers:PreTrainedModel.is_activation_checkpointing",
    "transformers:PreTrainedModel.loss_type",
    "transformers:PreTrainedModel.maybe_distribute_model",  # benchmarks
    "transformers:PreTrainedModel.prepare_distribute_model",  # benchmarks
    "transformers:PreTrainedModel.set_experts_implementation",
    "transformers:Qwen3MoeConfig.base_model_ep_plan",
    "transformers:PreTrainedModel.all_tied_weights_keys",
    "transformers.conversion_mapping:get_checkpoint_conversion_mapping",
    "transformers.conversion_mapping:get_model_conversion_mapping",
    "transformers.core_model_loading:PrefixChange",
    "transformers.core_model_loading:WeightConverter.add_tensor",
    "transformers.core_model_loading:WeightConverter.convert",
    "transformers.core_model_loading:WeightRenaming",
    "transformers.core_model_loading:WeightTransform.reverse_transform",
    "transformers.core_model_loading:apply_converters",
    "transformers.core_model_loading:apply_renamings",
    "transformers.core_model_loading:dot_natural_key",
    "transformers.core_model_loading:rename_source_key",
    "transformers.integrations.flash_attention:flash_attention_forward",
    "transformers.integrations.moe:ALL_EXPERTS_FUNCTIONS",
    "transformers.integrations.sdpa_attention:sdpa_attention_forward",
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS",
    "transformers.masking_utils:and_masks",
    "transformers.masking_utils:causal_mask_function",
    "transformers.masking_utils:create_masks_for_generate",
    "transformers.masking_utils:packed_sequence_mask_function",
    "transformers.masking_utils:padding_mask_function",
    "transformers.masking_utils:sliding_window_causal_mask_function",
    "transformers.modeling_rope_utils:RopeParameters",
    "transformers.modeling_rope_utils:RotaryEmbeddingConfigMixin.ignore_keys_at_rope_validation",
    "transformers.modeling_rope_utils:RotaryEmbeddingConfigMixin.nested_rope_parameter_keys",
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS",
    "transformers.utils.chat_template_utils:render_jinja_template",
    "transformers.models.qwen3_moe.modeling_qwen3_moe:eager_attention_forward",
]

# Marks on objects that transformers looks for (FSDP2 sets the first): no name to import, so the sources must mention
# them.
MARKS = {
    "torch.distributed.fsdp._fully_shard._fully_shard": ["_is_fsdp_managed_module"],
    "transformers.distributed.fsdp": ["_is_fsdp_managed_module"],
    "transformers.generation.utils": ["is_fsdp_managed_module"],
    "transformers.initialization": ["_is_hf_initialized"],
    "transformers.integrations.moe": ["_experts_implementation"],
    "wandb.integration.torch.wandb_torch": ["_wandb_hook_names"],
    "transformers.models.qwen3_moe.modeling_qwen3_moe": [
        "ALL_ATTENTION_FUNCTIONS",
        "sliding_window=",
        "create_causal_mask",
    ],
}

PACKAGE = Path(lightning_ep.__file__).parent
LIBRARIES = ("torch", "lightning", "transformers", "peft")
FAILURE = "an upgrade moved it; find what took its place, then raise the bound in pyproject.toml"


@pytest.mark.parametrize("entry", [*PRIVATE, *UNDOCUMENTED])
def test_name_exists(entry: str) -> None:
    module_name, _, path = entry.partition(":")
    owner = importlib.import_module(module_name)
    for name in path.split("."):
        if not hasattr(owner, name):
            assert inspect.isclass(owner), f"{entry}: {FAILURE}"
            assert _set_on_instances(owner, name), f"{entry}: {FAILURE}"
            return
        owner = getattr(owner, name)


@pytest.mark.parametrize(("module", "mark"), [(module, mark) for module, marks in MARKS.items() for mark in marks])
def test_mark_is_looked_for(module: str, mark: str) -> None:
    assert mark in inspect.getsource(importlib.import_module(module)), f"{module}: {mark}: {FAILURE}"


def test_every_private_name_that_the_package_uses_is_listed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    listed = {part for entry in PRIVATE for part in entry.partition(":")[2].split(".")}
    listed |= {mark for marks in MARKS.values() for mark in marks}
    own = {name for tree in trees.values() for name in _defined(tree)}
    for path, tree in trees.items():
        used = set(_imported(tree)) | _overridden(tree) | (_accessed(tree) - own)
        missing = sorted(used - listed - {"_exit"})  # os._exit is documented
        assert not missing, f"{path.relative_to(PACKAGE.parent)} uses {missing}: add them to the table in {__file__}"


def _set_on_instances(owner: type, name: str) -> bool:
    return any(f"self.{name}" in inspect.getsource(base) for base in owner.__mro__ if base.__module__ != "builtins")


def _private(name: str | None) -> bool:
    return bool(name) and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def _imported(tree: ast.AST) -> Iterator[str]:
    """Private names imported from the libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in LIBRARIES and _private(a.name))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
            if _private(node.module):
                yield str(node.module)
            yield from (alias.name for alias in node.names if _private(alias.name))


def _overridden(tree: ast.AST) -> set[str]:
    """Private methods that override a library's (the package's own classes override none of its own)."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if _private(f.name) and "override" in map(_decorator_name, f.decorator_list)}


def _decorator_name(node: ast.expr) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _accessed(tree: ast.AST) -> set[str]:
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _private(node.attr)}


def _defined(tree: ast.AST) -> Iterator[str]:
    """Private names that the package itself gives to functions, classes, variables and attributes of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"
