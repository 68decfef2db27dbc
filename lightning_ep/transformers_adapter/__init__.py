"""All that touches names of transformers that are not its public API.

One file for each question: where things are in a model (`structure`), who runs experts (`experts_interface`) and
attention (`attention_interface`), which tokens are one document (`packing`) and how attention is told
(`document_bounds`), how random weights are drawn
(`initialization`), what is fp32 in a bf16 model (`dtypes`), how weights come in and leave (`conversion`), what is
remembered of a model (`record`), and how conversations are written for it (`chat_templates`). Everyone else uses them
through this package, which imports nothing of ours but `ops` and `distributed`.
"""

from lightning_ep.transformers_adapter.attention_interface import (
    CONTEXT_PARALLEL,
    attention_function,
    attention_heads,
    attention_implementation,
    causal_mask,
    config_with_attention,
    is_context_parallel,
    is_flash_attention,
    select_attention,
    whole_sequence_mixers,
    why_not_context_parallel,
    without_packing,
)
from lightning_ep.transformers_adapter.chat_templates import marks_generation, render_chat
from lightning_ep.transformers_adapter.config_keys import near, unknown_keys
from lightning_ep.transformers_adapter.conversion import (
    Blueprint,
    Conversion,
    blueprint,
    export_conversions,
    hub_transforms,
    load_conversions,
    not_saved,
    peft_configs,
    saves_adapters,
    tied_names,
)
from lightning_ep.transformers_adapter.document_bounds import is_told_documents, use_bounds_of_documents, why_not_bounds
from lightning_ep.transformers_adapter.dtypes import cast_constants, fp32_parameters
from lightning_ep.transformers_adapter.experts_interface import (
    fused_form,
    local_experts_function,
    why_not_fused,
)
from lightning_ep.transformers_adapter.initialization import (
    allow_resizing_on_meta,
    apply_init_rule,
    follows_model,
    mark_initialized,
    marks_are_respected,
    note_own_modules,
    own_modules,
)
from lightning_ep.transformers_adapter.packing import (
    Packing,
    ReadOnHost,
    bounds_of,
    described,
    keep_documents_apart,
    note_packing,
    packing_of,
)
from lightning_ep.transformers_adapter.record import recall, remember
from lightning_ep.transformers_adapter.structure import (
    attention_modules,
    decoder_layers,
    experts_modules,
    keep_recording,
    model_class,
    optional_parts,
    pretrained_models,
    refuse_own_checkpointing,
    routers,
    shares_parameters,
    tensor_parallel_styles,
    tied,
)

__all__ = [
    "Blueprint",
    "CONTEXT_PARALLEL",
    "Conversion",
    "allow_resizing_on_meta",
    "Packing",
    "ReadOnHost",
    "apply_init_rule",
    "attention_function",
    "attention_heads",
    "attention_implementation",
    "attention_modules",
    "blueprint",
    "bounds_of",
    "cast_constants",
    "causal_mask",
    "config_with_attention",
    "decoder_layers",
    "described",
    "experts_modules",
    "export_conversions",
    "follows_model",
    "fp32_parameters",
    "fused_form",
    "hub_transforms",
    "is_context_parallel",
    "is_flash_attention",
    "is_told_documents",
    "keep_documents_apart",
    "keep_recording",
    "load_conversions",
    "local_experts_function",
    "mark_initialized",
    "marks_are_respected",
    "marks_generation",
    "model_class",
    "near",
    "not_saved",
    "note_own_modules",
    "note_packing",
    "optional_parts",
    "own_modules",
    "packing_of",
    "peft_configs",
    "pretrained_models",
    "recall",
    "refuse_own_checkpointing",
    "remember",
    "render_chat",
    "routers",
    "saves_adapters",
    "select_attention",
    "tensor_parallel_styles",
    "shares_parameters",
    "tied",
    "tied_names",
    "unknown_keys",
    "use_bounds_of_documents",
    "why_not_bounds",
    "whole_sequence_mixers",
    "why_not_context_parallel",
    "why_not_fused",
    "without_packing",
]
