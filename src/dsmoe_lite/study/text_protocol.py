"""The second protocol, on real text: the crossings of experts and gates that decide what the first left open."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from dsmoe_lite.accounting import parameters
from dsmoe_lite.common.errors import require
from dsmoe_lite.config import AttentionConfig
from dsmoe_lite.study.protocol import Tier
from dsmoe_lite.study.text_pilot import CORPUS_SHA256, tier
from dsmoe_lite.training.job import CorpusConfig, Job

VERSION = 2  # notebooks/07_text_protocol.md
SHORT, LONG = 750, 1500  # steps of 1,024 tokens
MODELS = {  # name -> (model of the first protocol, gates)
    "dense": ("dense", "printed"),
    "switch": ("switch", "printed"),
    "gshard": ("gshard", "printed"),  # divided by their sum
    "0+2-of-16": ("0+2-of-16", "softmax"),  # GShard with undivided gates
    "0+2-of-16-x1.5": ("gshard-x1.5", "softmax"),
    "1+1-of-15": ("1+1-of-15", "softmax"),
    "0+8-of-64": ("0+8-of-64", "softmax"),  # "-m": gates times m = 4
    "0+8-of-64-m": ("0+8-of-64", "softmax x m"),
    "1+7-of-63": ("deepseekmoe", "softmax"),  # DeepSeekMoE as printed
    "1+7-of-63-m": ("deepseekmoe", "softmax x m"),
}
UNITS = {  # expert parameters in all and for a token, in standard FFNs
    "dense": (1, 1),
    "switch": (16, 1),
    "0+2-of-16-x1.5": (24, 3),
    **dict.fromkeys(("gshard", "0+2-of-16", "1+1-of-15"), (16, 2)),
    **dict.fromkeys(("0+8-of-64", "0+8-of-64-m", "1+7-of-63", "1+7-of-63-m"), (16, 2)),
}
LR = {  # the outcome of the pilot
    "dense": 0.0025,
    "switch": 0.005,
    "gshard": 0.0025,
    "0+2-of-16": 0.005,
    "0+2-of-16-x1.5": 0.005,
    "1+1-of-15": 0.005,
    "0+8-of-64": 0.0025,
    "0+8-of-64-m": 0.0025,
    "1+7-of-63": 0.0025,
    "1+7-of-63-m": 0.0025,
}
SEEDS = (0, 1, 2, 3, 4)
MORE_SEEDS = (5, 6, 7, 8, 9)  # of the models that Table 1 compares
MORE = ("gshard", "0+2-of-16", "1+7-of-63", "1+7-of-63-m")
SHORTER = ("dense", "gshard", "0+2-of-16", "0+8-of-64-m", "1+7-of-63", "1+7-of-63-m")  # also with SHORT steps


def jobs(steps: int, models: Collection[str] = tuple(MODELS)) -> dict[str, Job]:
    """Return the runs of models with a number of steps, with the evaluations of Figure 4 and of domains.

    Raises InputError if a model's size differs from UNITS.
    """
    sizes = tier(steps)
    return _jobs(replace(sizes, train=replace(sizes.train, routing_every=250)), 1.0, models)


def larger_jobs() -> dict[str, Job]:
    """The same models for a GPU: twice the width, six layers, 25 million tokens in bf16, several passes over the text.

    No learning rate was tried at this size: all are divided by the ratio of the widths (muP, arXiv:2203.03466).
    """
    small = tier(LONG)
    dense = replace(
        small.dense,
        vocab_size=8192,
        d_model=256,
        n_layers=6,
        attention=AttentionConfig(n_heads=8, head_dim=32),
        ffn_width=256,
    )
    train = replace(small.train, batch_size=64, seq_len=256, routing_every=250)
    return _jobs(replace(small, dense=dense, train=train, vocab_size=8192, device="cuda"), 0.5, MODELS)


def _jobs(sizes: Tier, lr_factor: float, models: Collection[str]) -> dict[str, Job]:
    sizes = replace(sizes, corpus=CorpusConfig(kind="debian", sha256=CORPUS_SHA256))
    unit, found = parameters(sizes.dense).ffn.total, {}
    for name in models:
        model, gates = MODELS[name]
        job = sizes.job_of(model, gates, LR[name] * lr_factor)
        ffn = parameters(job.model).ffn
        total, active = UNITS[name]
        remedy = f"{name} needs {total * unit} and {active * unit}"
        require((ffn.total, ffn.active) == (total * unit, active * unit), "expert parameters", ffn, remedy)
        moe = job.model.moe
        found[name] = job if moe is None else replace(job, by_domain=True, **_best_removed(moe.n_routed_experts))
    return found


def _best_removed(E: int) -> dict[str, Any]:
    """Mask or silence a token's best expert, and its best sixteenth, which is one of 16 and four of 63 or 64."""
    n_sixteenth = round(E / 16)
    if n_sixteenth == 1:
        return {"masked": (1 / 16,), "silenced": (1,)}
    return {"masked": (1 / E, 1 / 16), "silenced": (1, n_sixteenth)}
