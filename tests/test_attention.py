"""MHA, GQA, MQA and the sliding window compared with a float64 loop; masks; padding; invalid configs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_by_hand import EXPERTS, KINDS, VOCAB, attention_by_hand, make_model, same_gradients, spread, tables
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_samples import line_of
from torch import Tensor

from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, YarnConfig, from_dict, to_dict
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.sdpa import attention_mask, sdpa, visible_keys

D = 5
CASES = {
    "mha": AttentionConfig(n_heads=4, head_dim=6),
    "gqa": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=2),
    "mqa": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=1),
    "one head": AttentionConfig(n_heads=1, head_dim=2),
    "window 1": AttentionConfig(n_heads=4, head_dim=6, window=1),
    "window 3": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=2, window=3),
    "window beyond the sequence": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=1, window=50),
    "theta and yarn": AttentionConfig(
        n_heads=2,
        head_dim=8,
        rope_theta=100.0,
        yarn=YarnConfig(factor=4, original_max_len=16, beta_fast=2.0, mscale=0.5),
    ),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make(config: AttentionConfig, seed: int = 0, d_model: int = D) -> Attention:
    torch.manual_seed(seed)
    layer = Attention(d_model, config).double()
    spread(layer)
    return layer


def run(layer: Attention, x: Tensor) -> Tensor:
    return layer(x, *tables(layer.config, x.shape[1]))


# The layer


@pytest.mark.parametrize("name", CASES)
def test_layer_equals_the_loop_forward_and_backward(name: str) -> None:
    layer = make(CASES[name])
    x = torch.randn(2, 7, D, dtype=torch.float64, requires_grad=True)
    actual, expected = run(layer, x), attention_by_hand(layer, x)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    same_gradients(layer, actual, expected, x)


@st.composite
def layers(draw: st.DrawFn) -> tuple[AttentionConfig, int, int]:
    H_kv, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    window = draw(st.none() | st.integers(1, 9))
    d = 2 * draw(st.integers(1, 3))
    config = AttentionConfig(n_heads=H_kv * per_group, head_dim=d, n_kv_heads=H_kv, window=window)
    return config, draw(st.integers(1, 2)), draw(st.integers(1, 8))


@given(case=layers(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_layer_equals_the_loop_in_all_shapes(case: tuple[AttentionConfig, int, int], seed: int) -> None:
    config, B, S = case
    layer = make(config, seed)
    x = torch.randn(B, S, D, dtype=torch.float64)
    torch.testing.assert_close(run(layer, x), attention_by_hand(layer, x), rtol=1e-11, atol=1e-12)


def test_gqa_with_as_many_groups_as_heads_is_mha() -> None:
    mha, gqa = make(CASES["mha"]), make(replace(CASES["mha"], n_kv_heads=4))
    gqa.load_state_dict(mha.state_dict())
    x = torch.randn(2, 7, D, dtype=torch.float64)
    assert torch.equal(run(gqa, x), run(mha, x))


@pytest.mark.parametrize("name", ["gqa", "mqa"])
def test_gqa_is_mha_with_every_key_and_value_repeated(name: str) -> None:
    gqa, mha = make(CASES[name]), make(CASES["mha"])
    weights = gqa.state_dict()
    for part in ("key.weight", "value.weight"):
        heads = weights[part].unflatten(0, (-1, 6))
        weights[part] = heads.repeat_interleave(4 // gqa.config.kv_heads, dim=0).flatten(0, 1)
    mha.load_state_dict(weights)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(run(gqa, x), run(mha, x), rtol=1e-12, atol=1e-12)


def test_a_window_of_one_passes_each_tokens_own_value() -> None:
    layer = make(CASES["window 1"])
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(run(layer, x), layer.output(layer.value(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 5, 6, 7])
def test_exactly_the_tokens_of_the_window_reach_a_token(window: int) -> None:
    """By gradients of one layer; two layers would see further."""
    layer = make(AttentionConfig(n_heads=2, head_dim=4, window=window))
    x = torch.randn(1, 7, D, dtype=torch.float64, requires_grad=True)
    y = run(layer, x)
    for t in range(7):
        (reached,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
        seen = [j for j in range(7) if reached[0, j].abs().max() > 0]
        assert seen == list(range(max(0, t - window + 1), t + 1))


def test_weights_have_the_expected_shapes() -> None:
    sizes = {name: tuple(weight.shape) for name, weight in make(CASES["gqa"]).named_parameters()}
    assert sizes == {"query.weight": (24, D), "key.weight": (12, D), "value.weight": (12, D), "output.weight": (D, 24)}


# Masks


@given(
    start=st.integers(0, 6), n_new=st.integers(1, 5), window=st.none() | st.integers(1, 8),
    pad=st.none() | st.lists(st.integers(0, 9), min_size=1, max_size=3), order=st.randoms(use_true_random=False),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_visible_keys_follow_from_each_pair_of_positions(start, n_new, window, pad, order) -> None:
    """The keys are old tokens in any order, as in a rolling cache, then the new tokens in order."""
    first = 0 if window is None else max(0, start - window + 1)
    old = list(range(first, start))
    order.shuffle(old)
    keys, queries = [*old, *range(start, start + n_new)], list(range(start, start + n_new))
    mask = visible_keys(torch.tensor(queries), torch.tensor(keys), window, None if pad is None else torch.tensor(pad))
    for row, padding in enumerate([0] if pad is None else pad):
        expected = [
            [j <= t and (window is None or t - j < window) and (j >= padding or j == t) for j in keys] for t in queries
        ]
        if mask is None:
            assert pad is None
            causal = [[j <= i for j in range(len(keys))] for i in range(len(keys))]
            assert expected == (causal if keys == queries else [[True] * len(keys)])
        else:
            actual = mask if pad is None else mask[row, 0]
            assert actual.tolist() == expected
    if pad is None and window is None:
        assert (mask is None) == (start == 0 or n_new == 1), "the kernel needs no mask"


def test_attention_mask_without_a_cache() -> None:
    cpu = torch.device("cpu")
    assert attention_mask(5, cpu) is None
    assert attention_mask(5, cpu, window=5) is None
    mask = attention_mask(5, cpu, window=4)
    assert mask is not None
    assert (mask == torch.ones(5, 5, dtype=torch.bool).tril()).logical_not().nonzero().tolist() == [[4, 0]]
    padded = attention_mask(3, cpu, pad=torch.tensor([0, 2]))
    assert padded is not None
    assert padded.shape == (2, 1, 3, 3)


def sdpa_by_loop(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    B, H, S, _ = q.shape
    H_kv, S_kv = k.shape[1:3]
    out = torch.zeros(B, H, S, v.shape[-1], dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for s in range(S):
                seen = torch.arange(S_kv) <= s + S_kv - S if mask is None else mask.expand(B, 1, S, S_kv)[b, 0, s]
                scores = (k[b, h * H_kv // H] @ q[b, h, s] * scale).masked_fill(~seen, -math.inf)
                out[b, h, s] = scores.softmax(dim=0) @ v[b, h * H_kv // H]
    return out


@given(
    H_kv=st.integers(1, 2), per_group=st.integers(1, 3), S=st.integers(1, 4), old=st.integers(0, 4),
    d=st.integers(1, 6), d_v=st.integers(1, 9), masked=st.sampled_from(["no", "all rows", "each row"]),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_sdpa_equals_a_loop(H_kv, per_group, S, old, d, d_v, masked, seed) -> None:
    """Values narrower and wider than keys, one query and several, groups, tensors that are not contiguous."""
    torch.manual_seed(seed)
    B, H, S_kv = 2, H_kv * per_group, old + S
    q = torch.randn(B, S, H, d, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(B, S_kv, H_kv, d, dtype=torch.float64).transpose(1, 2)
    v = torch.randn(B, H_kv, 2 * S_kv, d_v, dtype=torch.float64)[:, :, :S_kv]
    if masked == "no" and (S == 1 or old == 0):
        mask = None
    else:
        shape = (B, 1, S, S_kv) if masked == "each row" else (S, S_kv)
        mask = (torch.rand(shape) < 0.5) | torch.eye(S_kv, dtype=torch.bool)[old:]
    actual = sdpa(q, k, v, 0.7, mask)
    assert actual.shape == (B, H, S, d_v)
    torch.testing.assert_close(actual, sdpa_by_loop(q, k, v, 0.7, mask), rtol=1e-11, atol=1e-12)


# Whole models


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("name", KINDS)
def test_padding_changes_nothing(name: str, moe) -> None:
    model, lengths = make_model(KINDS[name], moe), (3, 11, 8, 1)
    rows = [torch.randint(0, VOCAB, (1, n)) for n in lengths]
    pad = torch.tensor([11 - n for n in lengths])
    filled = [torch.cat((torch.randint(0, VOCAB, (1, 11 - row.shape[1])), row), dim=1) for row in rows]
    together = model(torch.cat(filled), pad=pad).logits
    assert together.isfinite().all()
    for row, n, logits in zip(rows, lengths, together, strict=True):
        torch.testing.assert_close(logits[-n:], model(row).logits[0], rtol=1e-9, atol=1e-9)
    unpadded = model(torch.cat(filled)).logits
    assert not torch.allclose(unpadded[0, -3:], together[0, -3:], atol=1e-3), "padding that is seen should matter"


@pytest.mark.parametrize("name", KINDS)
def test_no_token_sees_the_future(name: str) -> None:
    model, tokens = make_model(KINDS[name]), torch.randint(0, VOCAB, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % VOCAB
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8], rtol=1e-12, atol=1e-12)
    assert (before[0, 8:] != after[0, 8:]).any(dim=1).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(name: str, dtype: torch.dtype) -> None:
    """Weights in half precision, and autocast; forward and backward."""
    model, tokens = make_model(KINDS[name]).float(), torch.randint(0, VOCAB, (2, 12))
    exact, bound = model(tokens).logits.detach(), 0.1 if dtype == torch.bfloat16 else 0.02
    with torch.autocast("cpu", dtype):
        automatic = model(tokens).logits
    automatic.float().square().mean().backward()
    for weight in model.parameters():
        assert weight.grad is not None
        assert weight.grad.isfinite().all()
    for logits in (automatic, model.to(dtype)(tokens).logits):
        assert logits.dtype == dtype
        assert float((logits.detach() - exact).abs().mean() / exact.std()) < bound


@pytest.mark.parametrize(
    ("tokens", "pad", "message"),
    [
        (torch.zeros(5, dtype=torch.long), None, "shape of tokens = (5,): must be (batch, sequence)"),
        (torch.zeros(0, 5, dtype=torch.long), None, "shape of tokens = (0, 5)"),
        (torch.zeros(2, 0, dtype=torch.long), None, "sequence length = 0: must be at least 1"),
        (torch.zeros(2, 65, dtype=torch.long), None, "sequence length = 65: must be at most max_seq_len = 64"),
        (torch.tensor([[0, VOCAB]]), None, f"token id = {VOCAB}: must be from 0 to {VOCAB - 1}"),
        (torch.tensor([[0, -1]]), None, "token id = -1"),
        (torch.zeros(2, 5, dtype=torch.long), [0, 1], "pad = [0, 1]: must be a tensor of 2 whole numbers"),
        (torch.zeros(2, 5, dtype=torch.long), torch.tensor([1]), "pad = (1,): must be a tensor of 2"),
        (torch.zeros(2, 5, dtype=torch.long), torch.tensor([[1, 0]]), "pad = (1, 2)"),
        (torch.zeros(2, 5, dtype=torch.long), torch.tensor([1.0, 0.0]), "pad = (2,): must be a tensor of 2 whole"),
    ],
)
def test_invalid_calls_are_refused_in_one_line(tokens: Tensor, pad: Any, message: str) -> None:
    model = make_model(KINDS["gqa"])
    assert message in line_of(lambda: model(tokens, pad=pad))


def test_token_ids_may_be_int32() -> None:
    model = make_model(KINDS["gqa"], replace(EXPERTS, scoring_func="hash", top_k=1))
    tokens, pad = torch.tensor([[3, 1, 4]]), torch.tensor([1])
    assert torch.equal(model(tokens.int(), pad=pad.int()).logits, model(tokens, pad=pad).logits)


# Configs

MLA = MLAConfig(n_heads=4, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=16)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (CASES["gqa"], {"window": 0}, "window = 0: must be a whole number of at least 1"),
        (CASES["gqa"], {"window": 2.5}, "window = 2.5"),
        (CASES["gqa"], {"n_kv_heads": 3}, "n_kv_heads = 3: must divide n_heads = 4"),
        (CASES["gqa"], {"n_kv_heads": 8}, "n_kv_heads = 8: must divide n_heads = 4"),
        (CASES["gqa"], {"n_kv_heads": 0}, "n_kv_heads = 0"),
        (CASES["gqa"], {"n_heads": True}, "n_heads = True"),
        (CASES["gqa"], {"head_dim": 7}, "head_dim = 7: must be even"),
        (CASES["gqa"], {"head_dim": 0}, "head_dim = 0"),
        (CASES["gqa"], {"rope_theta": 1.0}, "rope_theta = 1.0: must be a finite number above 1"),
        (CASES["gqa"], {"rope_theta": math.nan}, "rope_theta = nan"),
        (MLA, {"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3: must be even"),
        (MLA, {"qk_rope_head_dim": 0}, "qk_rope_head_dim = 0"),
        (MLA, {"q_lora_rank": 0}, "q_lora_rank = 0"),
        (MLA, {"kv_lora_rank": 0}, "kv_lora_rank = 0"),
        (MLA, {"qk_nope_head_dim": 0}, "qk_nope_head_dim = 0"),
        (MLA, {"v_head_dim": 1.0}, "v_head_dim = 1.0"),
        (MLA, {"n_heads": -1}, "n_heads = -1"),
        (MLA, {"rope_theta": math.inf}, "rope_theta = inf"),
    ],
)
def test_invalid_attention_configs_are_refused(kind, change: dict[str, Any], message: str) -> None:
    assert message in line_of(lambda: replace(kind, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"foo": 3}, "attention.foo = 3: no such field"),
        ({"n_kv_heads": 2}, "attention.n_kv_heads = 2: no such field"),
        ({"window": 3}, "attention.window = 3: no such field"),
        ({"n_heads": "4"}, "n_heads = '4': must be int, not str"),
        ({"kv_lora_rank": 4.0}, "kv_lora_rank = 4.0: must be int, not float"),
        ({"kv_lora_rank": None}, "kv_lora_rank = None: must be int"),
        ({"kv_lora_rank": 0}, "kv_lora_rank = 0"),
        ({"v_head_dim": ...}, "v_head_dim: is missing"),
        (
            {"kv_lora_rank": ...},
            "attention.qk_nope_head_dim = 8: no such field",
        ),  # no latent: taken for an AttentionConfig
        ({"yarn": [40]}, "attention.yarn = [40]: must be a mapping"),
        ({"yarn": {"factor": 40}}, "original_max_len"),
        (
            {"yarn": {"factr": 40, "original_max_len": 64}},
            "attention.yarn.factr = 40: no such field; did you mean factor?",
        ),
        ({"yarn": {"factor": "40", "original_max_len": 64}}, "yarn.factor = '40': must be float, not str"),
        ({"yarn": {"factor": 0.5, "original_max_len": 64}}, "factor = 0.5"),
    ],
)
def test_invalid_plain_data_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    values = to_dict(ModelConfig(vocab_size=VOCAB, d_model=24, n_layers=2, attention=MLA, ffn_width=32))
    values["attention"] = {name: value for name, value in (values["attention"] | change).items() if value is not ...}
    line = line_of(lambda: from_dict(ModelConfig, values))
    assert message in line


@pytest.mark.parametrize("attention", [5, None, [], "mla", {}])
def test_a_value_that_is_no_attention_config_is_refused_in_one_line(attention: Any) -> None:
    values = to_dict(ModelConfig(vocab_size=VOCAB, d_model=24, n_layers=2, attention=MLA, ffn_width=32)) | {
        "attention": attention
    }
    assert "attention" in line_of(lambda: from_dict(ModelConfig, values)).lower()


def test_a_model_without_attention_is_refused() -> None:
    for attention in (None, 4, to_dict(MLA)):
        line = line_of(
            lambda attention=attention: ModelConfig(
                vocab_size=VOCAB, d_model=24, n_layers=2, attention=attention, ffn_width=32
            )
        )
        assert line.startswith("attention = ")
        assert ": must be AttentionConfig or MLAConfig, not " in line


@pytest.mark.parametrize("name", [*CASES, "mla", "mla, compressed queries, yarn"])
def test_configs_come_back_from_plain_data(name: str) -> None:
    attention = CASES.get(name) or KINDS[name]
    config = ModelConfig(vocab_size=VOCAB, d_model=24, n_layers=2, attention=attention, ffn_width=32)
    again = from_dict(ModelConfig, to_dict(config))
    assert again == config
    assert type(again.attention) is type(attention)


def test_plain_data_without_newer_fields_is_mha() -> None:
    old = {"n_heads": 4, "head_dim": 16, "rope_theta": 10000.0}
    values = to_dict(ModelConfig(vocab_size=VOCAB, d_model=24, n_layers=2, attention=MLA, ffn_width=32)) | {
        "attention": old
    }
    assert from_dict(ModelConfig, values).attention == AttentionConfig(n_heads=4, head_dim=16)
