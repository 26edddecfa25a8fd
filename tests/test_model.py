"""The full model compared with transformers' Llama, with copied weights."""

from pathlib import Path

import pytest
import torch
from attention_by_hand import EXPERTS, KINDS, make_model

from dsmoe_lite.checkpoint import load_model, save_model
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, from_dict, to_dict
from dsmoe_lite.generate import generate
from dsmoe_lite.model import Transformer

CONFIG = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=3,
    attention=AttentionConfig(n_heads=4, head_dim=8),
    ffn_width=48,
    max_seq_len=40,
)
MOE = ModelConfig(
    vocab_size=97,
    d_model=32,
    n_layers=3,
    attention=AttentionConfig(n_heads=4, head_dim=8),
    ffn_width=48,
    moe=MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, n_shared_experts=1),
    n_dense_layers=1,
    max_seq_len=40,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def llama_with_weights_of(model: Transformer) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.d_model,
            intermediate_size=c.ffn_width,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.attention.n_heads,
            head_dim=c.attention.head_dim,
            max_position_embeddings=c.max_seq_len,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.attention.rope_theta,
            attn_implementation="eager",
        )
    )
    names = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj",
        "ffn.down": "mlp.down_proj",
    }
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    weights["lm_head.weight"] = model.head.weight
    for layer, block in enumerate(model.blocks):
        for ours, theirs in names.items():
            weights[f"model.layers.{layer}.{theirs}.weight"] = block.get_submodule(ours).weight
    llama.load_state_dict({name: value.detach().clone() for name, value in weights.items()})
    return llama


def test_dense_model_equals_llama_forward_and_backward() -> None:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            torch.nn.init.normal_(weight, std=0.2)
    model = model.double()
    llama = llama_with_weights_of(model).double()
    tokens = torch.randint(0, 97, (2, 33))
    ours, theirs = model(tokens).logits, llama(tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # limited by the float32 rotation tables
    loss = torch.nn.functional.cross_entropy
    loss(ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    loss(theirs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    torch.testing.assert_close(model.embed.weight.grad, llama.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)
    down = model.blocks[1].get_submodule("ffn.down").weight
    torch.testing.assert_close(down.grad, llama.model.layers[1].mlp.down_proj.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "experts"])
def test_no_token_sees_the_future(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    tokens = torch.randint(0, 97, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_one_routing_for_each_layer_of_experts() -> None:
    output = Transformer(MOE)(torch.randint(0, 97, (2, 10)))
    assert [r.topk_ids.shape for r in output.routings] == [(20, 2)] * 2
    assert Transformer(CONFIG)(torch.randint(0, 97, (2, 10))).routings == ()


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", KINDS)
def test_models_of_every_kind_survive_being_saved(name: str, moe: MoEConfig | None, tmp_path: Path) -> None:
    model = make_model(KINDS[name], moe).float()
    if isinstance(KINDS[name], MLAConfig):
        model.blocks[0].attention.use("absorbed")  # the form changes no result and is not saved
    save_model(tmp_path / "a model.safetensors", model)
    again = load_model(tmp_path / "a model.safetensors")
    assert again.config == model.config
    tokens = torch.randint(0, model.config.vocab_size, (2, 12))
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", sorted(paths.DATA.glob("models/*.safetensors")), ids=lambda path: path.stem)
def test_recorded_models_still_load_and_generate(path: Path) -> None:
    model, prompts = load_model(path).double(), [list(range(5, 15)), list(range(30, 20, -1))]
    generated = generate(model, prompts, 12)  # with a cache if the experts have no capacities
    assert generated == generate(model, prompts, 12, use_cache=False)
    assert len({tuple(row) for row in generated}) == 2


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(InputError, match=r"sequence length = 41: must be at most max_seq_len = 40"):
        Transformer(CONFIG)(torch.zeros(1, 41, dtype=torch.int64))


def test_config_round_trip() -> None:
    assert from_dict(ModelConfig, to_dict(MOE)) == MOE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, "top_k = 9: must be at most n_routed_experts = 8"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_k": True}, "top_k = True"),
        ({"capacity_factor": float("nan")}, "capacity_factor = nan"),
        ({"capacity_factor": 0.0}, "capacity_factor = 0.0"),
        (
            {"scoring_func": "sigmoidal"},
            "scoring_func = 'sigmoidal': must be one of softmax, sigmoid, sqrtsoftplus, hash",
        ),
        ({"scoring_func": "hash"}, "top_k = 2: must be 1"),
        ({"top_k": 1, "norm_topk_prob": True}, "norm_topk_prob = True"),
        ({"second_choice": "random", "norm_topk_prob": False}, "second_choice = 'random'"),
        ({"expert_with": 3}, "expert_with"),
    ],
)
def test_invalid_configs_are_refused(change: dict, message: str) -> None:
    values = to_dict(MOE)
    values["moe"] |= change
    with pytest.raises(InputError, match=message):
        from_dict(ModelConfig, values)


def test_odd_head_dim_is_refused() -> None:
    with pytest.raises(InputError, match="head_dim = 7: must be even"):
        AttentionConfig(n_heads=4, head_dim=7)
