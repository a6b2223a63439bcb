"""Sizes of small models: by the names of fields, and what single architectures need beside them."""

from __future__ import annotations

from typing import Any

SIZES = {
    # Vocabulary and positions.
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "n_positions": 128,
    # The stream and its layers.
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_hidden_size": 48,
    # Attention.
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 6,
    "query_pre_attn_scalar": 8,
    "rotary_dim": 4,
    # Multi-head latent attention.
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
    # Experts.
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_top_k": 2,
    "expert_ffn_hidden_size": 16,
    "zero_expert_num": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "first_k_dense_replace": 1,
    # States in place of attention.
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
    "state_size": 8,
    "chunk_size": 4,
    # Images and sound.
    "image_size": 32,
    "patch_size": 8,
    "mm_tokens_per_image": 4,
    "depth": 2,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "projection_dim": 32,
}
"""The small value of a field wherever it has one that is not 0."""

NEVER_NONE = ("head_dim", "n_routed_experts", "num_experts_per_tok")
"""Fields that configurations leave to their users."""

_TWO_KINDS = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BY_KIND = {
    "rope_parameters": {kind: {**_ROPE, "mrope_section": [1, 1, 2]} for kind in _TWO_KINDS},
    "layer_types": _TWO_KINDS,
    "num_hidden_layers": 2,
}
_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}}
_PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8}
_GEMMA3N = {
    **_PER_LAYER,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": _TWO_KINDS * 2,
    "laurel_rank": 4,
    "intermediate_size": 48,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
}
_QWEN4 = {
    "eos_token_id": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 100,
    "heads_per_ngram": 2,
    "split_ngram_parts": 2,
}
_THINKER = {**_MROPE, "vision_start_token_id": 20, "vision_end_token_id": 21}
_MIXED_LAYERS = ["linear_attention", "full_attention", "linear_attention"]

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 5}},
    "cohere_compass": {"text_config": _BY_KIND},
    "cohere_compass_text": _BY_KIND,
    "cosmos3_edge": _MROPE,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "dots1": {"n_shared_experts": 1},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {"time_step_rank": 4},
    "gemma3n": {"text_config": _GEMMA3N},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config": _PER_LAYER},
    "gemma4_text": _PER_LAYER,
    "gemma4_unified_text": _PER_LAYER,
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
    },
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "glm_ocr": _MROPE,
    "glmga": _MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "granite4_vision": {
        "text_config": {"model_type": "granite"},
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
    },
    "granitemoehybrid": {"num_hidden_layers": 3, "layer_types": _MIXED_LAYERS},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}}},
    "jamba": {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 4, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _MROPE,
    "qwen2_5_omni_thinker": _THINKER,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_omni_moe_thinker": _THINKER,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [8, 24],
        "attention_head_size": 8,
    },
    "step3p7": {"text_config": {"sliding_window": 6}},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "xlm": {"emb_dim": 32},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""By `model_type`: fields of its configuration, those of its parts below them; `...` leaves one to its default."""
