"""What DeepSeek-V3 and V4 changed, one change at a time: routers and their balance, MTP, FP8 and hash layers.

All runs train two layers of the course's size on the world. A token uses 8 of 64 experts and one shared expert.
"""

from dataclasses import replace
from typing import Any

from dsmoe_lite.common.errors import require
from dsmoe_lite.config import ModelConfig
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import Job

VERSION = 4  # notebooks/13_protocol.md
PILOT_SEEDS = (100, 101, 102)
SEEDS = (0, 1, 2, 3, 4)

_TRAIN = TrainConfig(steps=1200, batch_size=32, seq_len=64, lr=3e-3, routing_every=150)
_BATCH = replace(_TRAIN, balance={"expert": 0.01})  # over the batch
_SEQUENCE = replace(_TRAIN, balance={"sequence": 0.01})
_BIAS = replace(_TRAIN, balance={"sequence": 1e-4}, bias_speed=0.001)  # DeepSeek-V3
_BOUNDED = replace(_BIAS, bias_kappa=2.0)
_FP8 = replace(_BIAS, precision="fp8", fp8_block=32)  # 2 blocks in a token of 64 channels; V3 has 56


def _models() -> dict[str, tuple[ModelConfig, TrainConfig]]:
    v3, v4 = preset("course-v3"), preset("course-v4")
    assert v3.moe is not None
    assert v4.moe is not None
    v3_moe, K = v3.moe, v3.moe.top_k
    v4 = replace(v4, moe=replace(v4.moe, top_k=K, routed_scaling_factor=v3_moe.routed_scaling_factor))

    def free(**changes: Any) -> ModelConfig:
        """V3's experts from all groups."""
        return replace(v3, moe=replace(v3_moe, topk_group=v3_moe.n_group, **changes))

    return {
        "softmax-batch": (free(scoring_func="softmax", expert_bias=False), _BATCH),
        "sigmoid-batch": (free(expert_bias=False), _BATCH),
        "sigmoid-sequence": (free(expert_bias=False), _SEQUENCE),
        "sigmoid-bias": (free(), _BIAS),
        "sigmoid-bounded": (free(), _BOUNDED),
        "v3": (v3, _BIAS),
        "v3-mtp": (replace(v3, n_mtp=1), _BIAS),
        "v3-fp8": (v3, _FP8),
        "sqrtsoftplus": (replace(v4, n_hash_layers=0), _BIAS),
        "v4": (v4, _BIAS),
    }


def _jobs() -> dict[str, Job]:
    """The runs by name. Raises InputError if a model's experts differ in number or size."""
    models = _models()
    for name, (model, _) in models.items():
        moe = model.moe
        assert moe is not None
        sizes = (moe.n_routed_experts, moe.top_k, moe.expert_width, moe.n_shared_experts, moe.routed_scaling_factor)
        require(sizes == (64, 8, 32, 1, 2.5), f"experts of {name}", sizes, "must be (64, 8, 32, 1, 2.5)")
    return {name: Job(model=model, train=train) for name, (model, train) in models.items()}


def _shorter(job: Job) -> Job:
    return replace(job, train=replace(job.train, steps=600, routing_every=50))


JOBS = _jobs()
PILOT = {name: _shorter(JOBS[name]) for name in ("softmax-batch", "sigmoid-bias", "v3", "v3-mtp", "v3-fp8", "v4")}
