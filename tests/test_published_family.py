"""Published caches, sizes and YaRN constants, recomputed from the configs of family.py."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dsmoe_lite.accounting import kv_cache_bytes, kv_cache_elements, parameters
from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, from_dict, to_dict
from dsmoe_lite.family import FAMILY
from dsmoe_lite.presets import PRESETS, preset
from dsmoe_lite.study import published

PUBLISHED = published.load()
CACHE, SIZES, YARN = PUBLISHED["kv_cache"], PUBLISHED["family"]["rows"], PUBLISHED["yarn"]
BF16 = 16


def with_mha(name: str) -> ModelConfig:
    """The model with full attention instead, with as many heads of width d_h."""
    config = preset(name)
    assert isinstance(config.attention, MLAConfig)
    return replace(
        config, attention=AttentionConfig(n_heads=config.attention.n_heads, head_dim=config.attention.qk_nope_head_dim)
    )


COMPUTED: dict[str, Callable[[], ModelConfig]] = {
    "DeepSeek 67B GQA8": lambda: preset("deepseek-67B"),
    "DeepSeek-V2 MLA": lambda: preset("deepseek-v2"),
    "DeepSeek-V2-Lite MLA": lambda: preset("deepseek-v2-lite"),
    "V2-Lite dims with MHA16": lambda: with_mha("deepseek-v2-lite"),
    "V2-paper large MHA (56 heads inferred)": lambda: preset("v2-large-mha"),
    "DeepSeek-V3 MLA": lambda: preset("deepseek-v3"),
    "DeepSeekMoE-16B MHA": lambda: preset("deepseekmoe-16B"),
    "DeepSeek 7B MHA": lambda: preset("deepseek-7B"),
    "LLaMA2-7B": lambda: preset("llama2-7B"),
    "Mixtral 8x7B": lambda: preset("mixtral-8x7B"),
    "Mixtral 8x22B": lambda: preset("mixtral-8x22B"),
    "DBRX": lambda: preset("dbrx"),
    "Grok-1": lambda: preset("grok-1"),
    "Qwen2.5-72B": lambda: preset("qwen2.5-72B"),
    "LLaMA-3.1-405B": lambda: preset("llama-3.1-405B"),
    "V2 if MHA (128h x128)": lambda: with_mha("deepseek-v2"),
    "V3 if MHA": lambda: with_mha("deepseek-v3"),
}
PRINTED = {
    "small MoE with MHA": "v2-small-mha",
    "small MoE with MLA": "deepseek-v2-lite",
    "large MoE with MHA": "v2-large-mha",
    "large MoE with MLA": "deepseek-v2",
    "DeepSeek-V3": "deepseek-v3",
    "Qwen2.5-72B": "qwen2.5-72B",
    "LLaMA-3.1-405B": "llama-3.1-405B",
    "DeepSeek-V2": "deepseek-v2",
    "DeepSeek 67B": "deepseek-67B",
}


def digits(text: str) -> int:
    """Decimals of a printed figure: "70.272 KB" -> 3."""
    match = re.match(r"\d+\.?(\d*)", text)
    assert match is not None
    return len(match[1])


def in_units(value: float, text: str) -> str:
    """`value` in the unit and with the decimals of `text`."""
    unit = re.sub(r"^[\d.]+", "", text)
    size = {"K": 1e3, " KB": 1e3, "B": 1e9, "%": 0.01}[unit]
    return f"{value / size:.{digits(text)}f}{unit}"


@pytest.mark.parametrize("row", CACHE["computed"], ids=lambda row: row["model"])
def test_every_cache_is_reproduced(row: dict[str, Any]) -> None:
    assert kv_cache_elements(COMPUTED[row["model"]]()) == row["elements"]  # KeyError: a row without a config


def test_every_config_of_the_table_is_a_row_of_it() -> None:
    assert [row["model"] for row in CACHE["computed"]] == list(COMPUTED)
    assert len(COMPUTED) == 17


@pytest.mark.parametrize("row", CACHE["published"], ids=lambda row: f"{row['model']}-{row['quantity']}")
def test_caches_as_printed(row: dict[str, Any]) -> None:
    config = preset(PRINTED[row["model"]])
    if row["quantity"] == "elements":
        value: float = kv_cache_elements(config)
    elif row["quantity"] == "bf16_bytes":
        value = kv_cache_bytes(config, 1, BF16)
    else:
        assert row["quantity"] == "reduction"
        other = preset(PRINTED[row["against"]])
        value = 1 - kv_cache_bytes(config, 4096, 6) / kv_cache_bytes(other, 4096, 16)
    assert in_units(value, row["text"]) == row["text"]


def test_the_printed_reduction_needs_six_bits() -> None:
    v2, dense = preset("deepseek-v2"), preset("deepseek-67B")
    by_bits = {bits: 1 - kv_cache_bytes(v2, 8, bits) / kv_cache_bytes(dense, 8, 16) for bits in (16, 8, 6, 4)}
    assert {bits: f"{share:.2%}" for bits, share in by_bits.items()} == {
        16: "82.24%", 8: "91.12%", 6: "93.34%", 4: "95.56%",
    }  # fmt: skip
    (entry,) = [entry for entry in PUBLISHED["discrepancies"] if entry["id"] == "v2-kv-93"]
    for words in ("82.2%", "93.34%", "93.3%", f"{kv_cache_elements(v2):,}", f"{kv_cache_elements(dense):,}"):
        assert words in entry["what"]


def test_a_printed_multiplier_is_not_the_quotient() -> None:
    v3, qwen, llama = (kv_cache_bytes(preset(n), 1, BF16) for n in ("deepseek-v3", "qwen2.5-72B", "llama-3.1-405B"))
    assert (f"{qwen / v3:.2f}", f"{llama / v3:.2f}") == ("4.66", "7.34")
    (entry,) = [entry for entry in PUBLISHED["discrepancies"] if entry["id"] == "v3-kv-multiplier"]
    for words in ("4.66x", "7.28x", "7.34"):
        assert words in entry["what"]


def test_the_formulas_are_those_of_the_attentions() -> None:
    n_h, d_h, L, n_g = 32, 128, 30, 8
    base = preset("deepseek-7B")
    assert (base.n_layers, base.attention.n_heads) == (L, n_h)
    made = {
        "MHA": AttentionConfig(n_heads=n_h, head_dim=d_h),
        "GQA": AttentionConfig(n_heads=n_h, head_dim=d_h, n_kv_heads=n_g),
        "MQA": AttentionConfig(n_heads=n_h, head_dim=d_h, n_kv_heads=1),
        "MLA": MLAConfig(
            n_heads=n_h, qk_nope_head_dim=d_h, qk_rope_head_dim=d_h // 2, v_head_dim=d_h, kv_lora_rank=4 * d_h
        ),
    }
    values = {
        "2 n_h d_h L": 2 * n_h * d_h * L,
        "2 n_g d_h L": 2 * n_g * d_h * L,
        "2 d_h L": 2 * d_h * L,
        "(d_c + d_h^R) L": (4 * d_h + d_h // 2) * L,
    }
    assert [entry["attention"] for entry in CACHE["formulas"]] == list(made)
    for entry in CACHE["formulas"]:
        counted = kv_cache_elements(replace(base, attention=made[entry["attention"]]))
        assert values[entry["elements"]] == counted
    assert kv_cache_elements(replace(base, attention=made["MLA"])) == 2.25 * 2 * d_h * L


@pytest.mark.parametrize("row", SIZES, ids=lambda row: row["model"])
def test_sizes(row: dict[str, Any]) -> None:
    counted = parameters(preset(row["model"]))
    assert counted.total == row["total"]
    assert in_units(counted.total, row["total_text"]) == row["total_text"]
    if "active_text" not in row:
        assert counted.active_all == counted.total
        return
    active = getattr(counted, row["active_as"])
    if row["model"] == "deepseek-v2-lite":  # the only truncated figure: no count rounds to it
        for value in (counted.active_all, counted.active_no_input_embed, counted.active_no_embed):
            assert in_units(value, row["active_text"]) != row["active_text"]
        active = math.floor(active / 1e8) * 1e8
    assert in_units(active, row["active_text"]) == row["active_text"]


def test_models_that_are_not_expressed_exactly() -> None:
    grok, qwen = preset("grok-1"), preset("qwen2.5-72B")
    four_norms = parameters(grok).total + 64 * 2 * 6144
    assert four_norms == 315_684_820_992
    assert in_units(four_norms, "315.68B") == "315.68B"
    assert in_units(four_norms - 131_072 * 6144, "314.88B") == "314.88B"
    assert parameters(qwen).total + 80 * (64 + 8 + 8) * 128 == 72_706_203_648  # biases of queries, keys and values
    small, large = (parameters(preset(f"v2-{size}-mha")) for size in ("small", "large"))
    assert (in_units(small.total, "15.8B"), in_units(small.active_no_input_embed, "2.5B")) == ("15.8B", "2.5B")
    assert in_units(large.total, "250.8B") == "235.6B"  # only the cache equals the paper's
    (entry,) = [entry for entry in PUBLISHED["discrepancies"] if entry["id"] == "v2-large-mha"]
    assert "235.6B" in entry["what"]
    assert "250.8B" in entry["what"]
    assert all(row["model"] not in ("grok-1", "qwen2.5-72B", "v2-large-mha") for row in SIZES)


def test_transformers_makes_models_of_these_sizes() -> None:
    """Embeddings, attention, experts and norms, counted by independent code from the same numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    checked = {row["model"]: row["total"] for row in SIZES if row["model"] != "deepseekmoe-16B"}
    checked |= {"llama-3.1-405B": parameters(preset("llama-3.1-405B")).total, "qwen2.5-72B": 72_706_203_648}
    for name, total in checked.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(theirs(name))
        assert sum(weight.numel() for weight in model.parameters()) == total, name


def theirs(name: str) -> Any:
    """The transformers config of a model of the family."""
    from transformers import AutoConfig

    config = preset(name)
    attention, moe = config.attention, config.moe
    fields = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_heads if isinstance(attention, MLAConfig) else attention.kv_heads,
        "intermediate_size": config.ffn_width,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if name == "dbrx":
        assert moe is not None
        return AutoConfig.for_model(
            "dbrx", d_model=config.d_model, n_heads=attention.n_heads, n_layers=config.n_layers,
            vocab_size=config.vocab_size, tie_word_embeddings=False,
            attn_config={"kv_n_heads": fields["num_key_value_heads"], "rope_theta": attention.rope_theta},
            ffn_config={"ffn_hidden_size": moe.expert_width, "moe_num_experts": moe.n_routed_experts,
                        "moe_top_k": moe.top_k},
        )  # fmt: skip
    if moe is None:
        return AutoConfig.for_model("qwen2" if name.startswith("qwen") else "llama", **fields)
    if name.startswith("mixtral"):
        return AutoConfig.for_model("mixtral", num_local_experts=moe.n_routed_experts, **fields)
    assert isinstance(attention, MLAConfig)
    mla = {key: getattr(attention, key) for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
                                                    "qk_rope_head_dim", "v_head_dim")}  # fmt: skip
    experts = {
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_width,
        "first_k_dense_replace": config.n_dense_layers,
    }
    return AutoConfig.for_model("deepseek_" + name.split("-")[1], **fields, **mla, **experts)


@pytest.mark.parametrize("entry", YARN["models"], ids=lambda entry: entry["model"])
def test_yarn_of_the_configs_is_the_published_one(entry: dict[str, Any]) -> None:
    attention = preset(entry["model"]).attention
    yarn = attention.yarn
    assert yarn is not None
    for field in ("factor", "original_max_len", "beta_fast", "beta_slow", "mscale"):
        assert getattr(yarn, field) == entry[field], field
    assert attention.rope_theta == entry["rope_theta"]
    root = 0.1 * yarn.mscale * math.log(yarn.factor) + 1
    coefficient = re.fullmatch(r"sqrt\(t\) = ([\d.]+) ln s \+ 1", entry["equation"])
    assert coefficient is not None
    assert float(coefficient[1]) * math.log(yarn.factor) + 1 == pytest.approx(root, rel=1e-12)
    assert f"{root:.6f}" == f"{entry['sqrt_t']:.6f}"
    assert f"{root**2:.6f}" == f"{entry['scale_multiplier']:.6f}"
    assert preset(entry["model"]).max_seq_len == yarn.factor * yarn.original_max_len


def test_yarn_mixes_the_pairs_between_low_and_high() -> None:
    attention, ramp = preset("deepseek-v3").attention, YARN["ramp"]
    assert ramp["pairs"] == attention.rope_dim / 2

    def pair(turns: float) -> float:  # the pair that makes so many turns over the original length
        return attention.rope_dim * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(attention.rope_theta))

    assert (math.floor(pair(32)), math.ceil(pair(1))) == (ramp["low"], ramp["high"])


def test_yarn_discrepancy_names_both_multipliers() -> None:
    (entry,) = [entry for entry in PUBLISHED["discrepancies"] if entry["id"] == "yarn-sqrt-t"]
    for model in YARN["models"]:
        assert f"{model['scale_multiplier']:.3f}" in entry["what"]


def test_rope_interleave_scores_are_equal_and_cached_keys_are_not() -> None:
    import torch
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import apply_rotary_emb
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    assert "rope-interleave" in {entry["id"] for entry in PUBLISHED["discrepancies"]}
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)  # (B, H, S, d)
    angles = torch.arange(5.0)[:, None] * 10.0 ** -torch.arange(4.0)  # (S, d / 2)
    in_place = apply_rotary_emb(q.float(), k.float(), torch.polar(torch.ones(1, 5, 4), angles[None]))
    both = torch.cat([angles, angles], dim=1)[None]
    apart = apply_rotary_pos_emb_interleave(q.float(), k.float(), both.cos(), both.sin())
    scores = [queries @ keys.transpose(-1, -2) for queries, keys in (in_place, apart)]
    torch.testing.assert_close(*scores)
    assert not torch.allclose(in_place[1], apart[1])
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    torch.testing.assert_close(in_place[1][..., order], apart[1])


def test_the_family_is_among_the_presets_and_survives_being_written() -> None:
    assert FAMILY.items() <= PRESETS.items()
    for name, config in FAMILY.items():
        assert preset(name) is config
        assert from_dict(ModelConfig, to_dict(config)) == config
    assert len({name.lower() for name in PRESETS}) == len(PRESETS)
