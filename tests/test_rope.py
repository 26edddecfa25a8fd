"""Rotary positions compared with a loop; their two layouts; YaRN compared with transformers and DeepSeek's numbers."""

import math

import pytest
import torch
from attention_by_hand import frequencies_by_hand, rotated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import YarnConfig
from dsmoe_lite.layers.rope import (
    apply_rope,
    apply_rope_pairs,
    pairs_to_halves,
    rope_frequencies,
    rope_tables,
    softmax_scale,
    yarn_range,
)

V2, V3 = YarnConfig(factor=40, original_max_len=4096, mscale=0.707), YarnConfig(factor=40, original_max_len=4096)
EVEN = st.integers(1, 32).map(lambda half: 2 * half)
THETAS = st.sampled_from([100.0, 10_000.0, 500_000.0])
YARNS = {
    "deepseek-v2": (64, 10_000.0, V2),
    "a short context": (64, 10_000.0, YarnConfig(factor=8.0, original_max_len=512)),
    "other betas": (128, 500_000.0, YarnConfig(factor=16.0, original_max_len=8192, beta_fast=48.0, beta_slow=2.0)),
    "few channels": (8, 10_000.0, YarnConfig(factor=4.0, original_max_len=2048)),
    "none fully divided": (32, 100.0, YarnConfig(factor=3.0, original_max_len=512)),
    "all divided": (16, 10_000.0, YarnConfig(factor=3.0, original_max_len=64)),
    "a step": (64, 1_000_000.0, YarnConfig(factor=2.5, original_max_len=4096, beta_fast=1.1, beta_slow=1.05)),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def exact_tables(rope_dim: int, length: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length, dtype=torch.float64), rope_frequencies(rope_dim, theta))
    return angles.cos(), angles.sin()


# Frequencies and tables


@given(rope_dim=EVEN, theta=THETAS)
@settings(max_examples=30, deadline=None)
def test_frequencies_equal_a_loop(rope_dim: int, theta: float) -> None:
    actual = rope_frequencies(rope_dim, theta)
    assert actual.dtype == torch.float64
    assert actual.tolist() == pytest.approx(frequencies_by_hand(rope_dim, theta), rel=1e-14)


@pytest.mark.parametrize("yarn", [None, V3])
def test_tables_are_exact_far_from_the_start(yarn: YarnConfig | None) -> None:
    """Float32 angles would be off by 0.01 at position 160000."""
    cos, sin = rope_tables(64, 160_001, yarn=yarn)
    assert cos.shape == sin.shape == (160_001, 32)
    assert cos.dtype == sin.dtype == torch.float32
    for position in (0, 1, 4095, 159_999, 160_000):
        angles = [position * frequency for frequency in frequencies_by_hand(64, 10_000.0, yarn)]
        assert cos[position].tolist() == pytest.approx([math.cos(a) for a in angles], abs=6e-8)
        assert sin[position].tolist() == pytest.approx([math.sin(a) for a in angles], abs=6e-8)


# Rotations


@given(rope_dim=EVEN, length=st.integers(1, 9), theta=THETAS, seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_rotation_equals_a_loop(rope_dim: int, length: int, theta: float, seed: int) -> None:
    torch.manual_seed(seed)
    x, turn = torch.randn(2, length, rope_dim, dtype=torch.float64), frequencies_by_hand(rope_dim, theta)
    actual = apply_rope(x, *exact_tables(rope_dim, length, theta))
    expected = torch.stack([rotated(row, t, turn) for sequence in x for t, row in enumerate(sequence)])
    torch.testing.assert_close(actual, expected.view_as(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(actual.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    assert torch.equal(actual[:, 0], x[:, 0])


@pytest.mark.parametrize("rotate", [apply_rope, apply_rope_pairs])
def test_scores_depend_on_the_distance_only(rotate) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    cos, sin = exact_tables(16, 200)
    scores = rotate(q.expand(200, -1), cos, sin) @ rotate(k.expand(200, -1), cos, sin).T  # [m, n]
    for distance in (-150, -7, 0, 1, 60):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0].std() > 0.5, "other distances should give other scores"


@given(rope_dim=EVEN, seed=st.integers(0, 99), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_layouts_differ_only_in_the_order_of_channels(rope_dim: int, seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    x = torch.randn(2, 5, rope_dim).to(dtype)
    cos, sin = rope_tables(rope_dim, 5)
    assert torch.equal(apply_rope(pairs_to_halves(x), cos, sin), pairs_to_halves(apply_rope_pairs(x, cos, sin)))


def test_the_order_of_the_layouts() -> None:
    assert pairs_to_halves(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    turned = apply_rope_pairs(x, torch.zeros(1, 2), torch.ones(1, 2))  # by 90 degrees
    assert turned.tolist() == [[-2.0, 1.0, -4.0, 3.0]]


def test_converted_weights_give_the_same_scores_and_other_channels() -> None:
    torch.manual_seed(0)
    H, d, S = 3, 8, 6
    x, (cos, sin) = torch.randn(S, 10, dtype=torch.float64), exact_tables(d, S)
    of_q, of_k = torch.randn(2, H, d, 10, dtype=torch.float64)  # dimension 1 is the outputs of a head
    q, k = (apply_rope_pairs(torch.einsum("hdc,sc->hsd", w, x), cos, sin) for w in (of_q, of_k))
    halves = (torch.einsum("hdc,sc->hsd", pairs_to_halves(w, dim=1), x) for w in (of_q, of_k))
    new_q, new_k = (apply_rope(y, cos, sin) for y in halves)
    torch.testing.assert_close(new_q @ new_k.mT, q @ k.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_k, pairs_to_halves(k), rtol=1e-13, atol=1e-13)
    only_q = new_q @ apply_rope(torch.einsum("hdc,sc->hsd", of_k, x), cos, sin).mT
    assert not torch.allclose(only_q, q @ k.mT, atol=0.1), "queries and keys must be converted together"


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(InputError, match="channels = 5: must be even"):
        pairs_to_halves(torch.zeros(2, 5))


# YaRN


def test_deepseeks_range_and_temperatures() -> None:
    assert yarn_range(64, 10_000.0, V3) == (10, 23)
    frequencies, plain = rope_frequencies(64, yarn=V3), rope_frequencies(64)
    assert torch.equal(frequencies[:11], plain[:11])
    torch.testing.assert_close(frequencies[23:], plain[23:] / 40, rtol=1e-15, atol=0)
    between = frequencies[11:23] / plain[11:23]
    assert (between.diff() < 0).all()
    assert 1 / 40 < between.min() < between.max() < 1
    for yarn, root, square in ((V2, 1.260804, 1.589626), (V3, 1.368888, 1.873854)):
        multiplier = softmax_scale(192, yarn) * math.sqrt(192)
        assert math.sqrt(multiplier) == pytest.approx(root, abs=5e-7)
        assert multiplier == pytest.approx(square, abs=5e-7)
    assert softmax_scale(192) == pytest.approx(192**-0.5, rel=1e-15)


def of_transformers(rope_dim: int, theta: float, yarn: YarnConfig) -> tuple[Tensor, float]:
    """The float32 frequencies of transformers, and its factor of cos and sin."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_len,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale,
    }
    config = LlamaConfig(
        hidden_size=rope_dim,
        num_attention_heads=1,
        head_dim=rope_dim,
        max_position_embeddings=int(yarn.factor * yarn.original_max_len),
        rope_parameters=scaling,
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))


@pytest.mark.parametrize("name", YARNS)
def test_yarn_frequencies_equal_transformers_and_a_loop(name: str) -> None:
    expected, of_tables = of_transformers(*YARNS[name])
    actual = rope_frequencies(*YARNS[name])
    torch.testing.assert_close(actual.float(), expected, rtol=1e-6, atol=0)
    assert of_tables == 1.0, "with mscale = mscale_all_dim, cos and sin are not scaled"
    assert actual.tolist() == pytest.approx(frequencies_by_hand(*YARNS[name]), rel=1e-14)
    assert not torch.allclose(actual, rope_frequencies(*YARNS[name][:2]), rtol=1e-3, atol=0)


@given(rope_dim=EVEN, theta=THETAS, mscale=st.floats(0, 2), qk_dim=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_a_factor_of_one_changes_nothing(rope_dim: int, theta: float, mscale: float, qk_dim: int) -> None:
    yarn = YarnConfig(factor=1, original_max_len=4096, mscale=mscale)
    torch.testing.assert_close(
        rope_frequencies(rope_dim, theta, yarn), rope_frequencies(rope_dim, theta), rtol=3e-16, atol=0
    )
    assert softmax_scale(qk_dim, yarn) == softmax_scale(qk_dim)


@given(rope_dim=EVEN, theta=THETAS, factor=st.floats(1, 100), length=st.integers(1, 10**6), slow=st.floats(0.1, 60))
@settings(max_examples=60, deadline=None)
def test_yarn_stays_between_the_two_extremes(
    rope_dim: int, theta: float, factor: float, length: int, slow: float
) -> None:
    plain = rope_frequencies(rope_dim, theta)
    share = (
        rope_frequencies(
            rope_dim, theta, YarnConfig(factor=factor, original_max_len=length, beta_fast=2 * slow, beta_slow=slow)
        )
        / plain
    )
    assert (share <= 1 + 1e-12).all()
    assert (share >= 1 / factor - 1e-12).all()
    assert (share.diff() <= 1e-12).all(), "the slower a pair, the more it is divided"


def test_if_every_pair_turns_often_enough_none_is_divided() -> None:
    """low = 7 > high = 3: the ramp of transformers then runs backwards and divides the first, fastest pair."""
    yarn = YarnConfig(factor=4, original_max_len=1_000_000)
    assert yarn_range(4, 10.0, yarn) == (7, 3)
    assert torch.equal(rope_frequencies(4, 10.0, yarn), rope_frequencies(4, 10.0))
    assert of_transformers(4, 10.0, yarn)[0][0] == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 0.5}, "factor = 0.5: must be a finite number of at least 1"),
        ({"factor": math.nan}, "factor = nan"),
        ({"factor": math.inf}, "factor = inf"),
        ({"original_max_len": 0}, "original_max_len = 0"),
        ({"original_max_len": 4096.0}, "original_max_len = 4096.0"),
        ({"beta_fast": 1.0}, "beta_fast = 1.0: must be above beta_slow = 1"),
        ({"beta_fast": 1.0, "beta_slow": 32.0}, "beta_fast = 1.0: must be above beta_slow = 32"),
        ({"beta_slow": 0.0}, "beta_slow = 0.0"),
        ({"beta_slow": math.nan}, "beta_slow = nan"),
        ({"mscale": -0.1}, "mscale = -0.1"),
        ({"mscale": True}, "mscale = True"),
    ],
)
def test_invalid_yarn_configs_are_refused(change: dict, message: str) -> None:
    with pytest.raises(InputError) as error:
        YarnConfig(**{"factor": 40, "original_max_len": 4096} | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
