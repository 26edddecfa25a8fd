"""The pilot of the protocol on real text: learning rates, and the spread over seeds, on seeds 100 to 102 only."""

from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.study.protocol import Tier
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job

SEEDS = (100, 101, 102)
MODELS = {  # name -> (model of chapter 07, gates)
    "dense": ("dense", "printed"),
    "switch": ("switch", "printed"),
    "gshard": ("gshard", "printed"),
    "0+2-of-16": ("0+2-of-16", "softmax"),
    "1+7-of-63": ("deepseekmoe", "softmax"),
    "1+7-of-63-m": ("deepseekmoe", "softmax x m"),
}


def tier(steps: int) -> Tier:
    """Four layers of width 128 on the text of Debian's packages; 2,048 tokens a step."""
    return Tier(
        ModelConfig(
            vocab_size=2048,
            d_model=128,
            n_layers=4,
            attention=AttentionConfig(n_heads=4, head_dim=32),
            ffn_width=128,
            max_seq_len=256,
        ),
        TrainConfig(steps=steps, batch_size=16, seq_len=128, routing_every=100),
        CorpusConfig(kind="debian"),
        2048,
        balance=0.01,
    )


def _at(lr: float, *models: str, steps: int = 600) -> dict[str, Job]:
    return {f"{lr:g}-{model}": tier(steps).job_of(*MODELS[model], lr) for model in models or MODELS}


# Three rates for every model.
RATES = _at(0.0025) | _at(0.005) | _at(0.01)
