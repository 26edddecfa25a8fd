"""Does a shared expert earn its place if every token needs the same computation beside a fact of its own?

The corpus `inflected` has a rule that all facts share; its control has the same text without the rule.
"""

from dataclasses import replace

from dsmoe_lite.data.inflected import InflectedConfig
from dsmoe_lite.study.protocol import CPU
from dsmoe_lite.training.job import CorpusConfig, Job

PILOT_SEEDS = (100, 101)
MODELS = {  # name -> (model of the first protocol, gates)
    "0+2-of-16": ("0+2-of-16", "softmax"),
    "1+1-of-15": ("1+1-of-15", "softmax"),
    "0+8-of-64-m": ("0+8-of-64", "softmax x m"),
    "1+7-of-63-m": ("deepseekmoe", "softmax x m"),
    "2+6-of-62-m": ("2+6-of-62", "softmax x m"),
}


def _jobs(label: str, *models: str, **config: int) -> dict[str, Job]:
    """Models of the first protocol's size, on a world with these settings."""
    tier = replace(CPU, corpus=CorpusConfig(kind="inflected", inflected=InflectedConfig(**config)))
    return {f"{label}-{name}": tier.job_of(*MODELS[name], CPU.train.lr) for name in models or MODELS}


# Four endings, and the control with one.
PILOT = _jobs("rule", "0+8-of-64-m", "1+7-of-63-m") | _jobs("control", "0+8-of-64-m", "1+7-of-63-m", n_endings=1)
