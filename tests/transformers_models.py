"""Small models of transformers, and their weights under the names of this package."""

import math
from typing import Any

import torch
from attention_by_hand import spread
from torch import Tensor, nn

from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig
from dsmoe_lite.layers.rope import pairs_to_halves
from dsmoe_lite.model import Transformer

PLAIN = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
LATENT = {
    "query": "q_proj",
    "query.down": "q_a_proj",
    "query.norm": "q_a_layernorm",
    "query.up": "q_b_proj",
    "kv_down": "kv_a_proj_with_mqa",
    "kv_norm": "kv_a_layernorm",
    "kv_up": "kv_b_proj",
    "output": "o_proj",
}


def both(config: ModelConfig, seed: int = 0) -> tuple[Transformer, nn.Module]:
    """Our model and the one of transformers, with the same random weights, in float64.

    Llama without experts, Mixtral with experts; with MLA, DeepSeek-V3 if experts have biases, else DeepSeek-V2.
    """
    torch.manual_seed(seed)
    theirs = spread(_make(config))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)
    ours = Transformer(config)
    ours.load_state_dict(_weights(theirs, config))
    return ours.double().eval(), theirs.double().eval()


def attention_weights(theirs: nn.Module, config: AttentionConfig | MLAConfig) -> dict[str, Tensor]:
    """The weights of one of their attention layers under our names."""
    state = theirs.state_dict()
    if isinstance(config, AttentionConfig):
        return {f"{ours}.weight": state[f"{name}.weight"] for ours, name in PLAIN.items()}
    weights = {f"{ours}.weight": state[f"{name}.weight"] for ours, name in LATENT.items() if f"{name}.weight" in state}
    query = "query.weight" if config.q_lora_rank is None else "query.up.weight"
    nope, rope = (
        weights[query]
        .unflatten(0, (config.n_heads, -1))
        .split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=1)
    )  # (H, d, width)
    weights[query] = torch.cat((nope, pairs_to_halves(rope, dim=1)), dim=1).flatten(0, 1)
    latent, rope = weights["kv_down.weight"].split((config.kv_lora_rank, config.qk_rope_head_dim))
    weights["kv_down.weight"] = torch.cat((latent, pairs_to_halves(rope, dim=0)))
    return weights


def rope_parameters(attention: AttentionConfig | MLAConfig) -> dict[str, Any]:
    """RoPE and YaRN in the form of transformers' configs."""
    yarn = attention.yarn
    if yarn is None:
        return {"rope_type": "default", "rope_theta": attention.rope_theta}
    if isinstance(attention, MLAConfig):
        scaling: dict[str, Any] = {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale}
    else:
        scaling = {"attention_factor": 0.1 * yarn.mscale * math.log(yarn.factor) + 1}  # of cos and sin
    return {
        "rope_type": "yarn",
        "rope_theta": attention.rope_theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        **scaling,
    }


def latent_options(c: MLAConfig) -> dict[str, Any]:
    """The options of DeepseekV2Config and DeepseekV3Config for MLA."""
    return {
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads,
        "qk_nope_head_dim": c.qk_nope_head_dim,
        "qk_rope_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "kv_lora_rank": c.kv_lora_rank,
        "q_lora_rank": c.q_lora_rank,
        "rope_parameters": rope_parameters(c),
        "attn_implementation": "sdpa",  # the eager one computes its softmax in float32
    }


def _make(config: ModelConfig) -> nn.Module:
    import transformers

    options: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "pad_token_id": None,
        "experts_implementation": "eager",  # the grouped one does not support float64
    }
    c, moe = config.attention, config.moe
    if isinstance(c, MLAConfig):
        options |= {"intermediate_size": config.ffn_width, **latent_options(c)}
        if moe is None:  # all layers are among the first, dense ones
            options |= {"first_k_dense_replace": config.n_layers}
            return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**options))
        options |= {
            "first_k_dense_replace": config.n_dense_layers,
            "moe_intermediate_size": moe.expert_width,
            "n_routed_experts": moe.n_routed_experts,
            "n_shared_experts": moe.n_shared_experts,
            "num_experts_per_tok": moe.top_k,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "n_group": moe.n_group,
            "topk_group": moe.topk_group,
            "norm_topk_prob": moe.norm_topk_prob,
        }
        if moe.expert_bias:
            return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**options, num_mtp_layers=0))
        return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**options))
    options |= {
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "rope_parameters": rope_parameters(c),
        "attn_implementation": "sdpa",
    }
    if moe is None:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=config.ffn_width, **options))
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            intermediate_size=moe.expert_width,
            num_local_experts=moe.n_routed_experts,
            num_experts_per_tok=moe.top_k,
            sliding_window=c.window,
            **options,
        )
    )


def _weights(theirs: nn.Module, config: ModelConfig) -> dict[str, Tensor]:
    state = theirs.state_dict()
    weights = {
        "embed.weight": state["model.embed_tokens.weight"],
        "norm.weight": state["model.norm.weight"],
        "head.weight": state["lm_head.weight"],
    }
    for layer in range(config.n_layers):
        block = theirs.get_submodule(f"model.layers.{layer}")
        parts = {f"attention.{name}": w for name, w in attention_weights(block.self_attn, config.attention).items()}
        parts["attention_norm.weight"] = block.input_layernorm.weight
        parts["ffn_norm.weight"] = block.post_attention_layernorm.weight
        parts |= {f"ffn.{name}": weight for name, weight in _ffn(block.mlp, config, layer).items()}
        weights |= {f"blocks.{layer}.{name}": weight for name, weight in parts.items()}
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _ffn(mlp: nn.Module, config: ModelConfig, layer: int) -> dict[str, Tensor]:
    state = mlp.state_dict()
    if config.moe is None or not config.is_moe_layer(layer):
        return {f"{part}.weight": state[f"{part}_proj.weight"] for part in ("gate", "up", "down")}
    gate, up = state["experts.gate_up_proj"].chunk(2, dim=1)
    weights = {
        "router.weight": state["gate.weight"],
        "experts.gate": gate,
        "experts.up": up,
        "experts.down": state["experts.down_proj"],
    }
    if config.moe.expert_bias:
        weights["router.expert_bias"] = state["gate.e_score_correction_bias"]
    if config.moe.n_shared_experts:
        for part in ("gate", "up", "down"):
            weights[f"shared.{part}.weight"] = state[f"shared_experts.{part}_proj.weight"]
    return weights
