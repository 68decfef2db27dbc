"""Tiny models of every MoE family that transformers can build. Their weights are tested: not all have a forward."""

from __future__ import annotations

from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    CLIPVisionConfig,
    LlavaConfig,
    PreTrainedConfig,
)

# Wherever a config has an attribute of that name.
_SIZES: dict[str, int] = {
    "vocab_size": 128, "vocab_size_per_layer_input": 128, "hidden_size": 32, "d_model": 32, "embed_dim": 32,
    "out_hidden_size": 32, "downsample_hidden_size": 16, "projection_dim": 32, "output_dim": 32,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48, "encoder_ffn_dim": 32, "moe_intermediate_size": 16, "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "moe_latent_size": 16, "num_hidden_layers": 4, "num_layers": 2, "depth": 2,
    "encoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "swa_num_attention_heads": 4, "num_key_value_heads": 2, "swa_num_key_value_heads": 2, "head_dim": 8,
    "global_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16,
    "o_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_num_heads": 4, "mamba_n_heads": 4,
    "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_n_groups": 1, "n_groups": 1, "mamba_d_state": 8,
    "ssm_state_size": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_expert_group": 1,
    "first_k_dense_replace": 1, "max_position_embeddings": 64, "num_position_embeddings": 16, "image_size": 28,
    "patch_size": 14, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_HEADS = {"num_key_value_heads": 4}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_ROUTED = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
# What a family needs beside, or in place of these.
_MORE: dict[str, dict[str, Any]] = {
    "axk1": _HEADS,
    "axk2": _HEADS,
    "bailing_hybrid": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_ocr2_text": {
        **_HEADS, "num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]
    },
    "deepseek_v2": {**_HEADS, "num_experts_per_tok": 2},
    "deepseek_v3": _HEADS,
    "deepseek_v32": _HEADS,
    "diffusion_gemma_text": _ROUTED,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {
        "num_hidden_layers": 2, "adapter_input_size": 32, "adapter_out_dim": 32, "feature_size": 16
    },
    "dots3_note_vision_encoder": {
        "num_hidden_layers": 2, "pyramid_num_routed": [-1, 4], "num_experts_per_tok": 2, "adapter_in_dim": 32,
        "adapter_out_dim": 32,
    },
    "dots3_note_text": {
        **_HEADS, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2},
    "ernie4_5_vl_moe_text": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": [16, 16], **_MROPE
    },
    "gemma4": {
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2, "patch_size": 4,
            "position_embedding_size": 16,
        }
    },
    "gemma4_text": {**_ROUTED, "enable_moe_block": True},
    "glm4_moe_lite": _HEADS,
    "glm4v_moe_text": {"rope_parameters": {**_MROPE["rope_parameters"], "partial_rotary_factor": 1.0}},
    "glm5_next_text": {
        **_HEADS, "linear_num_heads": 2, "linear_head_dim": 8, "index_topk": 16, "qk_rope_head_dim": 0, "qk_head_dim": 8
    },
    "glm_moe_dsa": _HEADS,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": 2},
    "inkling_audio": {"n_mel_bins": 4, "mel_vocab_size": 8},
    "inkling_vision": {"num_hidden_layers": 4, "patch_size": 4},
    "inkling2_vision": {
        "text_hidden_size": 32, "projection_hidden_dim": 32, "num_hidden_layers": 2, "posemb_grid_size": 4
    },
    "kimi_k25": {"projection_hidden_size": 32},
    "kimi_linear": {"num_experts_per_token": 2, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mistral4": {
        **_HEADS, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral_large4_text": _HEADS,
    "muse_spark": {"out_hidden_size": 128, "projector_hidden_size": 64},
    "muse_spark_audio": {"hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "muse_spark_text": {"moe_hidden_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "eos_token_id": 2,
        "indexer_compress_ratio": 4, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 32, "split_ngram_parts": 2,
        "ngram_vocab_size_base": 50, "heads_per_ngram": 2, "output_gate_type": "sigmoid",
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "indexed_attention"],
    },
    "nemotron3_5_transcribe_asr_audio": _HEADS,
    "nemotron3_diarization_audio": _HEADS,
    "nemotron3_5_transcribe_word_timestamp": {**_HEADS, "blank_token_id": 127},
    "Nemotron3DiarizationHeadConfig": {"audio_hidden_size": 32},  # a class without a model type
    "nemotron_h_omni": {
        "vision_hidden_size": 32, "projector_hidden_size": 32, "audio_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_mel_bins": 16, "subsampling_conv_channels": 8, "projection_hidden_size": 32, "projection_bias": False,
        },
        "image_token_id": 100, "video_token_id": 101, "audio_token_id": 102,
    },
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},  # else other numbers on other ranks
    "Qwen3OmniMoeCode2WavConfig": {"decoder_dim": 32},
    "Qwen3OmniMoeTalkerConfig": {"spatial_merge_size": 2},  # which its class reads and does not declare
    "qwen3_omni_moe_vision_encoder": {"deepstack_visual_indexes": (0, 1)},
    "qwen3_vl_moe_vision": {"deepstack_visual_indexes": (0, 1)},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 3},  # of files, not of the class
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "radio": {"num_hidden_layers": 2, "video_temporal_patch_size": 2, "max_img_size": 56},
    "step3p5": {"sliding_window": 8},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": (32, 32)},
    "unlimited_ocr_text": _HEADS,
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
FAMILIES = [
    "afmoe", "aria", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma", "dots1", "dots3_note",
    "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "flex_olmo", "flint", "gemma4", "gemma4_text",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm4v_moe_text", "glm5_next", "glm5_next_text", "glm_moe_dsa", "gpt_oss",
    "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4",
    "inkling2", "inkling2_text", "inkling_mm_model", "inkling_text", "jamba", "kimi_k25", "kimi_linear", "kolibri1",
    "laguna", "lfm2_moe", "llava", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl",
    "minimax_m3_vl_text", "mistral4", "mistral_large4", "mistral_large4_text", "mixtral", "muse_spark",
    "muse_spark_text", "nemo_speechlm", "nemotron_h", "nemotron_h_omni", "olmoe", "openai_privacy_filter", "phimoe",
    "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next", "qwen3_omni_moe",
    "qwen3_omni_moe_thinker", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen4_exp", "qwen4_exp_text", "solar_open",
    "step3p7", "unlimited_ocr", "zaya",
]  # fmt: skip
# Not built here: parts of those above for which `AutoModel` knows no class.
LEFT_OUT = {
    *("deepseek_ocr2_text", "diffusion_gemma_text", "ernie4_5_vl_moe_text", "qwen3_omni_moe_text", "step3p5"),
    *("dots3_note_vision_encoder", "qwen3_omni_moe_talker_text", "unlimited_ocr_text"),
}


def declared() -> set[str]:
    """The model types of transformers whose plan, or whose part's, spreads experts. Imports all of its configs."""

    def spreads(cls: type[PreTrainedConfig]) -> bool:
        plan = getattr(cls, "base_model_ep_plan", None) or {}
        parts = [part for part in (cls.sub_configs or {}).values() if part.__name__ != "AutoConfig"]
        return "ep_dispatch_experts" in plan.values() or any(map(spreads, parts))

    return {model_type for model_type, cls in CONFIG_MAPPING.items() if spreads(cls)}


def tiny_config_of(model_type: str) -> PreTrainedConfig:
    """A config of that family with few and small layers."""
    if model_type == "llava":
        sizes = {name: _SIZES[name] for name in ("hidden_size", "image_size", "patch_size", "projection_dim")}
        vision = CLIPVisionConfig(num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **sizes)
        return LlavaConfig(text_config=tiny_config_of("mixtral"), vision_config=vision)
    return shrunk(CONFIG_MAPPING[model_type]())


def shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration like this one with few and small layers."""
    arguments: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            arguments[name] = shrunk(value)
        elif name in _SIZES and isinstance(value, int):
            arguments[name] = _SIZES[name]
    return type(config)(**{**arguments, **_MORE.get(config.model_type or type(config).__name__, {})})


def auto_class_of(config: PreTrainedConfig) -> Any:
    """What builds the largest model of that config."""
    several = any(isinstance(value, PreTrainedConfig) for value in vars(config).values())
    multimodal = [AutoModelForImageTextToText, AutoModelForMultimodalLM]
    autos = [*(multimodal if several else []), AutoModelForCausalLM, AutoModel]
    return next(auto for auto in autos if type(config) in auto._model_mapping)
