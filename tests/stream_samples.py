"""A display that remembers, and a small model, for tests of streamed text."""

import torch
from tokenizers import Tokenizer

from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.model import Transformer


class Shown:
    """Stands in for IPython's display: collects the bundles it was given."""

    def __init__(self) -> None:
        self.bundles: list[dict[str, str]] = []

    def __call__(self, bundle: dict[str, str], **_: object) -> "Shown":
        self.bundles.append(bundle)
        return self

    update = __call__


def small_model(n_mtp: int = 0) -> tuple[Transformer, Tokenizer]:
    """One layer with random weights that prefer some tokens, and the course's tokenizer."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(World(), 1024)
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        n_layers=1,
        attention=AttentionConfig(n_heads=2, head_dim=16),
        ffn_width=32,
        max_seq_len=64,
        init_std=0.3,
        n_mtp=n_mtp,
    )
    return Transformer(config), tokenizer
