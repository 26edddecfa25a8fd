"""MoE layers compared with those of transformers: copied weights, float32, forward and backward.

Differences there: DeepSeek-V2 ignores norm_topk_prob and masks groups with 0.0, which is the lowest softmax score; its
balance loss is K times ours and joins all layers (test_known_bugs.py).
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dsmoe_lite.config import MoEConfig
from dsmoe_lite.layers.balance import expert_loss
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.layers.router import Router

VOCABULARY = 8
D = 20


def mixtral(c: MoEConfig) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=D,
            intermediate_size=c.expert_width,
            num_local_experts=c.n_routed_experts,
            num_experts_per_tok=c.top_k,
        )
    )


def olmoe(c: MoEConfig) -> nn.Module:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=D,
            intermediate_size=c.expert_width,
            num_experts=c.n_routed_experts,
            num_experts_per_tok=c.top_k,
            norm_topk_prob=c.norm_topk_prob,
        )
    )


def qwen3(c: MoEConfig) -> nn.Module:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=D,
            moe_intermediate_size=c.expert_width,
            num_experts=c.n_routed_experts,
            num_experts_per_tok=c.top_k,
            norm_topk_prob=c.norm_topk_prob,
        )
    )


def deepseek_v2(c: MoEConfig) -> nn.Module:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Config, DeepseekV2Moe

    return DeepseekV2Moe(
        DeepseekV2Config(
            hidden_size=D,
            moe_intermediate_size=c.expert_width,
            n_routed_experts=c.n_routed_experts,
            n_shared_experts=c.n_shared_experts,
            num_experts_per_tok=c.top_k,
            routed_scaling_factor=c.routed_scaling_factor,
            topk_method="greedy" if c.n_group == 1 else "group_limited_greedy",
            n_group=c.n_group,
            topk_group=c.topk_group,
            norm_topk_prob=True,  # has no effect there
            num_attention_heads=1,
        )
    )


def deepseek_v3(c: MoEConfig) -> nn.Module:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    return DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D,
            moe_intermediate_size=c.expert_width,
            n_routed_experts=c.n_routed_experts,
            n_shared_experts=c.n_shared_experts,
            num_experts_per_tok=c.top_k,
            routed_scaling_factor=c.routed_scaling_factor,
            n_group=c.n_group,
            topk_group=c.topk_group,
            norm_topk_prob=c.norm_topk_prob,
        )
    )


def deepseek_v4(c: MoEConfig) -> nn.Module:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Config, DeepseekV4SparseMoeBlock

    return DeepseekV4SparseMoeBlock(
        DeepseekV4Config(
            vocab_size=VOCABULARY,
            hidden_size=D,
            num_hidden_layers=1,
            moe_intermediate_size=c.expert_width,
            n_routed_experts=c.n_routed_experts,
            num_experts_per_tok=c.top_k,
            routed_scaling_factor=c.routed_scaling_factor,
            scoring_func=c.scoring_func,
            swiglu_limit=c.swiglu_limit,
            mlp_layer_types=["hash_moe" if c.chooser == "hash" else "moe"],
        ),
        layer_idx=0,
    )


V3 = MoEConfig(
    n_routed_experts=16,
    top_k=4,
    expert_width=12,
    n_shared_experts=1,
    scoring_func="sigmoid",
    expert_bias=True,
    norm_topk_prob=True,
    n_group=4,
    topk_group=2,
    group_score="top2",
    routed_scaling_factor=2.5,
)
V4 = MoEConfig(
    n_routed_experts=16,
    top_k=6,
    expert_width=12,
    n_shared_experts=1,
    scoring_func="sqrtsoftplus",
    expert_bias=True,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    swiglu_limit=0.5,  # 10 in V4, which these small numbers would not reach
)
CASES = {
    "mixtral": (mixtral, MoEConfig(n_routed_experts=8, top_k=2, expert_width=12, norm_topk_prob=True)),
    "olmoe": (olmoe, MoEConfig(n_routed_experts=16, top_k=4, expert_width=12)),
    "olmoe, normalised": (olmoe, MoEConfig(n_routed_experts=16, top_k=4, expert_width=12, norm_topk_prob=True)),
    "qwen3": (qwen3, MoEConfig(n_routed_experts=12, top_k=3, expert_width=8, norm_topk_prob=True)),
    "deepseek-v2, greedy": (deepseek_v2, MoEConfig(n_routed_experts=16, top_k=6, expert_width=12, n_shared_experts=2)),
    "deepseek-v2, scaled": (
        deepseek_v2,
        MoEConfig(n_routed_experts=16, top_k=6, expert_width=12, n_shared_experts=2, routed_scaling_factor=16.0),
    ),
    "deepseek-v2, groups": (
        deepseek_v2,
        MoEConfig(
            n_routed_experts=16,
            top_k=3,
            expert_width=12,
            n_shared_experts=2,
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
        ),
    ),
    "deepseek-v3": (deepseek_v3, V3),
    "deepseek-v3, one group": (deepseek_v3, replace(V3, n_group=1, topk_group=1)),
    "deepseek-v3, one of three groups": (deepseek_v3, replace(V3, n_routed_experts=15, n_group=3, topk_group=1)),
    "deepseek-v3, not normalised": (deepseek_v3, replace(V3, norm_topk_prob=False, n_shared_experts=2)),
    "deepseek-v4": (deepseek_v4, V4),
    "deepseek-v4, hash layer": (deepseek_v4, V4.for_hash_layer()),
    "deepseek-v4 with V3's scores": (deepseek_v4, replace(V4, scoring_func="sigmoid")),
}


def copied(theirs: nn.Module, ours: MoELayer) -> dict[str, Tensor]:
    """Our weights under their names; gate and up are one matrix there."""
    experts = ours.experts
    weights = {
        "gate.weight": ours.router.weight,
        "experts.gate_up_proj": torch.cat((experts.gate, experts.up), dim=1),
        "experts.down_proj": experts.down,
    }
    if ours.router.config.expert_bias:
        weights["gate.e_score_correction_bias"] = ours.router.expert_bias
    if ours.router.config.chooser == "hash":
        weights["gate.tid2eid"] = ours.router.hash_table
    if ours.shared is not None:
        for name in ("gate", "up", "down"):
            weights[f"shared_experts.{name}_proj.weight"] = ours.shared.get_submodule(name).weight
    return {name: value.detach().clone() for name, value in weights.items()}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_layer_equals_that_of_transformers(name: str, seed: int) -> None:
    make, config = CASES[name]
    torch.manual_seed(seed)
    ours = MoELayer(D, config, VOCABULARY)
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    if config.expert_bias:
        ours.router.expert_bias.normal_(std=0.2).sub_(1.0)  # most biased scores are negative
    theirs = make(config)
    theirs.load_state_dict(copied(theirs, ours))
    x, target = torch.randn(4, 9, D), torch.randn(4, 9, D)
    mine, yours = x.clone().requires_grad_(), x.clone().requires_grad_()
    token_ids = torch.randint(VOCABULARY, (4, 9))
    y, routing = ours(mine, token_ids)
    expected = theirs(yours, token_ids) if make is deepseek_v4 else theirs(yours)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y * target).sum().backward()
    (expected * target).sum().backward()
    assert mine.grad is not None
    assert ours.router.weight.grad is not None
    torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.router.weight.grad, theirs.get_parameter("gate.weight").grad, rtol=1e-4, atol=1e-4)
    down = theirs.get_parameter("experts.down_proj")
    torch.testing.assert_close(ours.experts.down.grad, down.grad, rtol=1e-4, atol=1e-5)
    assert len({tuple(sorted(ids)) for ids in routing.topk_ids.tolist()}) > 5, (
        "the case should choose many different sets of experts"
    )


@pytest.mark.parametrize("seed", range(3))
def test_mixtrals_balance_loss_of_one_layer_is_k_times_the_expert_loss(seed: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    torch.manual_seed(seed)
    router = Router(D, MoEConfig(n_routed_experts=8, top_k=2, expert_width=12, norm_topk_prob=True), 8)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(50, D), (1, 50))
    theirs = load_balancing_loss_func((routing.logits,), num_experts=8, top_k=2)
    torch.testing.assert_close(2 * expert_loss(routing), theirs, rtol=1e-5, atol=0)
