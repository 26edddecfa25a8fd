"""The pilot of the protocol on real text: learning rates, and the spread over seeds, on seeds 100 to 102 only."""

from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.study.protocol import Tier
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job

SEEDS = (100, 101, 102)
CORPUS_SHA256 = "c5203f6467ea9689a93a2ac0ece852b3548bbded28f4172ecc621849284297bb"  # the versions in its records
MODELS = {  # name -> (model of chapter 07, gates)
    "dense": ("dense", "printed"),
    "switch": ("switch", "printed"),
    "gshard": ("gshard", "printed"),
    "0+2-of-16": ("0+2-of-16", "softmax"),
    "1+7-of-63": ("deepseekmoe", "softmax"),
    "1+7-of-63-m": ("deepseekmoe", "softmax x m"),
}


def tier(steps: int) -> Tier:
    """Four layers of width 128 on the text of Debian's packages; 1,024 tokens a step."""
    return Tier(
        ModelConfig(
            vocab_size=2048,
            d_model=128,
            n_layers=4,
            attention=AttentionConfig(n_heads=4, head_dim=32),
            ffn_width=128,
            max_seq_len=256,
        ),
        TrainConfig(steps=steps, batch_size=16, seq_len=64, routing_every=100),
        CorpusConfig(kind="debian"),
        2048,
        balance=0.01,
    )


def _at(lr: float, sizes: Tier, *models: str) -> dict[str, Job]:
    return {f"{lr:g}-{model}": sizes.job_of(*MODELS[model], lr) for model in models}


# First 600 steps of 2,048 tokens, in documents twice as long, with rates of 0.0025 and 0.01 (data/runs/
# text-pilot-large-steps, of an earlier recipe of the corpus). The loss stayed high, and the higher rate was worse. So
# twice as many steps of half as many tokens.
SMALL = tier(1200)
SMALL_STEPS = _at(0.0025, SMALL, "dense", "1+7-of-63-m") | _at(0.005, SMALL, "dense")
# Now experts pay. Are 500 steps enough? No: all models are still far above.
FEW_STEPS = _at(0.00125, tier(500), "dense", "switch")
# Two rates for every model, at the shorter of the two lengths of the protocol.
RATES = {name: job for lr in (0.005, 0.0025) for name, job in _at(lr, tier(1000), *MODELS).items()}
# The better rate of each, on two more seeds, to measure the spread over seeds.
SPREAD = {name: RATES[name] for name in ("0.005-dense", "0.0025-gshard", "0.005-0+2-of-16", "0.0025-1+7-of-63-m")}
# The spread is as large as what the rates differ by, so all other rates on these seeds too.
RATES_AGAIN = {name: job for name, job in RATES.items() if name not in SPREAD}
