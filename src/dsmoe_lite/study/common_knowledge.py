"""Does a shared expert earn its place if every token needs the same computation beside a fact of its own?

The corpus `inflected` has a rule that all facts share; its control has the same text without the rule.
"""

from collections.abc import Iterable
from dataclasses import replace

from dsmoe_lite.data.inflected import InflectedConfig
from dsmoe_lite.study.protocol import CPU
from dsmoe_lite.training.job import CorpusConfig, Job

VERSION = 3  # notebooks/07_common_protocol.md
PILOT_SEEDS = (100,)
MODELS = {  # name -> (model of the first protocol, gates)
    "0+2-of-16": ("0+2-of-16", "softmax"),
    "1+1-of-15": ("1+1-of-15", "softmax"),
    "0+8-of-64-m": ("0+8-of-64", "softmax x m"),
    "1+7-of-63-m": ("deepseekmoe", "softmax x m"),
}
FINE = ("0+8-of-64-m", "1+7-of-63-m")
WORLDS = {"rule": InflectedConfig(), "control": InflectedConfig(n_endings=1)}  # four endings, and one
SEEDS = (0, 1, 2, 3, 4)
MORE_SEEDS = (5, 6, 7, 8, 9)  # of the fine models


def _jobs(models: Iterable[str]) -> dict[str, Job]:
    """Models of the first protocol's size on both worlds, as in rule-1+7-of-63-m."""
    found = {}
    for world, config in WORLDS.items():
        tier = replace(CPU, corpus=CorpusConfig(kind="inflected", inflected=config))
        for name in models:
            found[f"{world}-{name}"] = tier.job_of(*MODELS[name], CPU.train.lr)
    return found


def _without_best_expert(job: Job) -> Job:
    """Also evaluate the run with each token's best routed expert replaced, and silenced."""
    assert job.model.moe is not None
    return replace(job, masked=(1 / job.model.moe.n_routed_experts,), silenced=(1,))


PILOT = _jobs(FINE)
JOBS = {name: _without_best_expert(job) for name, job in _jobs(MODELS).items()}
MORE = tuple(name for name in JOBS if name.endswith(FINE))
