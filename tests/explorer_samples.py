"""Made-up traces for the explorer: any number of layers, experts and tokens."""

import numpy as np

from dsmoe_lite.routing.trace import RoutingTrace

WORDS = ("The", " tool", " of", " Ridi", " Lava", " is", " 日本", ".", "\n")


def made_up(
    n_layers: int, n_experts: int, n_tokens: int, *, top_k: int = 2, n_devices: int = 4, seed: int = 0
) -> RoutingTrace:
    """A trace of random choices; capacity has dropped a choice of token 3 in the first layer."""
    draw = np.random.default_rng(seed)
    scores = draw.dirichlet(np.full(n_experts, 0.3), (n_layers, n_tokens))
    topk_ids = np.argsort(-scores, axis=2)[:, :, :top_k]
    kept = np.ones(topk_ids.shape, bool)
    kept[0, min(3, n_tokens - 1), 0] = False
    loss = draw.exponential(1.0, n_tokens)
    loss[0] = np.nan
    return RoutingTrace(
        tokens=tuple(WORDS[t % len(WORDS)] for t in range(n_tokens)),
        token_ids=np.arange(n_tokens, dtype=np.int32),
        domain=("",) * n_tokens,
        token_type=("word",) * n_tokens,
        topk_ids=topk_ids.astype(np.int16),
        gates=np.take_along_axis(scores, topk_ids, 2).astype(np.float16),
        kept=kept,
        scores=scores.astype(np.float16),
        loss=loss.astype(np.float32),
        device_of=(np.arange(n_experts) * n_devices // n_experts).astype(np.int8),
        n_shared=1,
        n_devices=n_devices,
    )
