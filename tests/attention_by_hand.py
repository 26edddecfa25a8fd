"""Attention from its equations, one token and one head at a time, and small models with every kind of attention."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsmoe_lite.config import AnyAttention, AttentionConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsmoe_lite.layers.attention import Attention
from dsmoe_lite.layers.mla import MLA
from dsmoe_lite.layers.rope import rope_frequencies
from dsmoe_lite.model import Transformer

VOCAB, D = 61, 24
YARN = YarnConfig(factor=4, original_max_len=64, mscale=0.707)
KINDS: dict[str, AnyAttention] = {
    "mha": AttentionConfig(n_heads=4, head_dim=6),
    "gqa": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=2),
    "mqa": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=1),
    "window": AttentionConfig(n_heads=4, head_dim=6, n_kv_heads=2, window=5),
    "mla": MLAConfig(n_heads=4, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, kv_lora_rank=8),
    "mla, compressed queries, yarn": MLAConfig(
        n_heads=4, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=12, q_lora_rank=10, yarn=YARN
    ),
}
EXPERTS = MoEConfig(n_routed_experts=8, top_k=2, expert_width=12, n_shared_experts=1)


def make_model(
    attention: AnyAttention, moe: MoEConfig | None = None, max_seq_len: int = 64, *, seed: int = 0, n_layers: int = 2
) -> Transformer:
    """A model in float64 whose logits vary so much that an error in attention shows."""
    torch.manual_seed(seed)
    model = Transformer(
        ModelConfig(
            vocab_size=VOCAB,
            d_model=D,
            n_layers=n_layers,
            attention=attention,
            ffn_width=32,
            moe=moe,
            max_seq_len=max_seq_len,
        )
    )
    return spread(model).double().eval()


def spread(module: nn.Module) -> nn.Module:
    """Draw weights that keep activations near 1, and scales of norms between 0.5 and 1.5. Return the module."""
    for weight in module.parameters():
        if weight.ndim == 1:
            nn.init.uniform_(weight, 0.5, 1.5)
        else:
            nn.init.normal_(weight, std=1.3 * weight.shape[-1] ** -0.5)
    return module


def tables(attention: AnyAttention, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin in float64; the package rounds its tables to float32."""
    frequencies = rope_frequencies(attention.rope_dim, attention.rope_theta, attention.yarn)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return angles.cos(), angles.sin()


def frequencies_by_hand(rope_dim: int, theta: float, yarn: YarnConfig | None = None) -> list[float]:
    """Radians per token of every pair of channels."""
    plain = [theta ** (-2 * j / rope_dim) for j in range(rope_dim // 2)]
    if yarn is None:
        return plain

    def pair(turns: float) -> float:
        return rope_dim * math.log(yarn.original_max_len / (2 * math.pi * turns)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), rope_dim - 1)
    assert low < high, "the case should have a ramp"
    mixed = []
    for j, frequency in enumerate(plain):
        ramp = 1 if j <= low else 0 if j >= high else 1 - (j - low) / (high - low)
        mixed.append(ramp * frequency + (1 - ramp) * frequency / yarn.factor)
    return mixed


def rotated(x: Tensor, position: int, frequencies: Sequence[float]) -> Tensor:
    """x (d,) with channels j and j + d/2 rotated by position * frequencies[j]."""
    half, out = len(x) // 2, [torch.zeros(())] * len(x)
    for j, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        out[j] = cos * x[j] - sin * x[j + half]
        out[j + half] = sin * x[j] + cos * x[j + half]
    return torch.stack(out)


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMSNorm of one vector."""
    assert norm.eps is not None
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def temperature(yarn: YarnConfig | None) -> float:
    """The factor of the scores under YaRN."""
    return 1.0 if yarn is None else (0.1 * yarn.mscale * math.log(yarn.factor) + 1) ** 2


def weighted(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float) -> Tensor:
    """sum_j softmax_j(scale q k_j) v_j for one query."""
    weights = torch.stack([scale * (q @ key) for key in keys]).exp()
    return sum((w * v for w, v in zip(weights, values, strict=True)), torch.zeros(())) / weights.sum()


def attention_by_hand(layer: Attention, x: Tensor) -> Tensor:
    """x (B, S, D) -> (B, S, D): o_t = W_o [softmax_j(q_t,i k_j,g / sqrt(d)) v_j,g]_i, g = floor(i H_kv / H)."""
    c, d = layer.config, layer.config.head_dim
    H_kv = c.n_kv_heads or c.n_heads
    turn = frequencies_by_hand(d, c.rope_theta, c.yarn)
    scale = temperature(c.yarn) / math.sqrt(d)
    rows = []
    for sequence in x:
        keys = [[rotated(p, j, turn) for p in (layer.key.weight @ h).split(d)] for j, h in enumerate(sequence)]
        values = [(layer.value.weight @ h).split(d) for h in sequence]
        for t, h in enumerate(sequence):
            first = 0 if c.window is None else max(0, t + 1 - c.window)
            heads = []
            for i, q in enumerate((layer.query.weight @ h).split(d)):
                g = i * H_kv // c.n_heads
                seen = range(first, t + 1)
                seen_keys, seen_values = [keys[j][g] for j in seen], [values[j][g] for j in seen]
                heads.append(weighted(rotated(q, t, turn), seen_keys, seen_values, scale))
            rows.append(layer.output.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


def mla_by_hand(layer: MLA, x: Tensor) -> Tensor:
    """x (B, S, D) -> (B, S, D): DeepSeek-V2's Equations 9-19, with the norms of the released models."""
    c = layer.config
    d_h, d_r, d_v, d_c = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
    turn = frequencies_by_hand(d_r, c.rope_theta, c.yarn)
    scale = temperature(c.yarn) / math.sqrt(d_h + d_r)
    w_dkv, w_kr = layer.kv_down.weight[:d_c], layer.kv_down.weight[d_c:]
    w_uk = [layer.kv_up.weight[i * (d_h + d_v) :][:d_h] for i in range(c.n_heads)]
    w_uv = [layer.kv_up.weight[i * (d_h + d_v) + d_h :][:d_v] for i in range(c.n_heads)]
    rows = []
    for sequence in x:
        latents = [normed(w_dkv @ h, layer.kv_norm) for h in sequence]
        shared = [rotated(w_kr @ h, j, turn) for j, h in enumerate(sequence)]
        for t, h in enumerate(sequence):
            if c.q_lora_rank is None:
                all_q = layer.query.weight @ h
            else:
                down, norm, up = (layer.query.get_submodule(name) for name in ("down", "norm", "up"))
                all_q = up.weight @ normed(down.weight @ h, norm)
            heads = []
            for i, q in enumerate(all_q.split(d_h + d_r)):
                q = torch.cat((q[:d_h], rotated(q[d_h:], t, turn)))
                keys = [torch.cat((w_uk[i] @ latents[j], shared[j])) for j in range(t + 1)]
                values = [w_uv[i] @ latents[j] for j in range(t + 1)]
                heads.append(weighted(q, keys, values, scale))
            rows.append(layer.output.weight @ torch.cat(heads))
    return torch.stack(rows).view_as(x)


def same_gradients(layer: nn.Module, ours: Tensor, by_hand: Tensor, x: Tensor) -> None:
    """Assert that two outputs of `layer` for x have the same gradients for x and every weight, in float64."""
    target = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours).sin()
    inputs = [x, *layer.parameters()]
    actual, expected = (torch.autograd.grad((y * target).sum(), inputs) for y in (ours, by_hand))
    for one, other in zip(actual, expected, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
