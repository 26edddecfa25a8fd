"""The overlap of a token's two best experts, by hand and where it is known."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIG as SMALL

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.overlap import output_overlap

MOE = MoEConfig(n_routed_experts=6, top_k=3, expert_width=4, n_shared_experts=1)
TOKENS = torch.arange(24).view(2, 12) % 40


def made(moe: MoEConfig = MOE) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(SMALL, moe=moe, init_std=0.5)).double()


def test_each_token_by_hand() -> None:
    model = made()
    model.train()
    overlaps = output_overlap(model, TOKENS)
    assert model.training
    model.eval()
    inputs: list[torch.Tensor] = []
    for layer in model.moe_layers:
        layer.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0][1, 7]))
    with torch.no_grad():
        routings = model(TOKENS).routings
        assert len(overlaps) == len(routings) > 0
        for layer, u, routing, overlap in zip(model.moe_layers, inputs, routings, overlaps, strict=True):
            assert overlap.shape == (24,)
            w = layer.experts
            one, other = (
                w.down[i] @ (F.silu(w.gate[i] @ u) * (w.up[i] @ u)) for i in routing.topk_ids[12 + 7, :2].tolist()
            )
            cosine = (one @ other / (one.norm() * other.norm())).item()
            assert overlap[12 + 7].item() == pytest.approx(cosine, abs=1e-12)


def test_equal_experts_have_cosine_1_and_opposite_ones_minus_1() -> None:
    model = made()
    for layer in model.moe_layers:
        for weight in (layer.experts.gate, layer.experts.up, layer.experts.down):
            weight.data[:] = weight.data[:1]
    assert all(overlap.min() > 1 - 1e-9 for overlap in output_overlap(model, TOKENS))
    for layer in model.moe_layers:
        layer.experts.down.data *= torch.tensor([1.0, -1.0] * 3).double()[:, None, None]
    assert all(torch.allclose(overlap.abs(), torch.ones(24).double()) for overlap in output_overlap(model, TOKENS))
    assert any(overlap.min() < 0 for overlap in output_overlap(model, TOKENS))


def test_one_expert_cannot_overlap() -> None:
    with pytest.raises(InputError, match="top_k = 1: a token needs two routed experts"):
        output_overlap(made(replace(MOE, top_k=1)), TOKENS)
    with pytest.raises(InputError, match="top_k = 0"):
        output_overlap(Transformer(replace(SMALL, moe=None)), TOKENS)
