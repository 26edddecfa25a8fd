"""Models by name: the sizes of the course, the nine validation models of DeepSeekMoE, and the models of family.py.

The validation models are those of DeepSeekMoE (arXiv:2401.06066), Tables 1, 2, 8 and 9; Section 4.1 and Table 7 give
their sizes. In the paper a standard FFN has 8 D^2 parameters, so a SwiGLU has a width of 8/3 D = 3413.33. Widths here
are 3413.33 times the relative expert size, rounded to an integer. The paper's vocabulary of 8K is 8192 here. The paper
drops no token in these runs: no validation model has a capacity, and GShard always sends its second choice.

Capacity of the course models: GShard prints C = 2 n / (g E) for n tokens in g groups. That is the fair share T * K / E
of its two choices, a capacity factor of 1.0 in this package: any imbalance drops tokens. The course uses 1.25 in
training and 2.0 in evaluation, the values of ST-MoE (arXiv:2202.08906).

The gates of course-deepseekmoe are scaled by m = 4; the paper's are not. A softmax over m times as many experts makes
every gate about m times smaller, and the course compares this model with course-gshard, which has m = 1.
"""

from dataclasses import replace
from difflib import get_close_matches

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.family import FAMILY, V3_EXPERTS

_WIDTH = 3413  # of a standard FFN of the validation models

_VALIDATION = ModelConfig(
    vocab_size=8192,
    d_model=1280,
    n_layers=9,
    attention=AttentionConfig(n_heads=10, head_dim=128),
    ffn_width=_WIDTH,
    max_seq_len=2048,
    init_std=0.006,
)
_SWITCH = MoEConfig(n_routed_experts=16, top_k=1, expert_width=_WIDTH)
_GSHARD = MoEConfig(n_routed_experts=16, top_k=2, expert_width=_WIDTH, norm_topk_prob=True)

_COURSE = ModelConfig(
    vocab_size=1024,
    d_model=64,
    n_layers=2,
    attention=AttentionConfig(n_heads=4, head_dim=16),
    ffn_width=128,
    max_seq_len=256,
)
_COURSE_GSHARD = MoEConfig(
    n_routed_experts=16,
    top_k=2,
    expert_width=128,
    norm_topk_prob=True,
    second_choice="random",
    capacity_factor=1.25,
    eval_capacity_factor=2.0,
)
_COURSE_SWITCH = replace(_COURSE_GSHARD, top_k=1, norm_topk_prob=False, second_choice="all")
_COURSE_HASH = MoEConfig(n_routed_experts=16, top_k=1, expert_width=128, scoring_func="hash")

PRESETS = {
    "course-dense": _COURSE,
    "course-dense-x2": replace(_COURSE, ffn_width=256),  # as many active FFN weights as course-gshard
    "course-gshard": replace(_COURSE, moe=_COURSE_GSHARD),
    "course-switch": replace(_COURSE, moe=_COURSE_SWITCH),
    "course-hash": replace(_COURSE, moe=_COURSE_HASH),
    "course-deepseekmoe": replace(
        _COURSE,
        moe=MoEConfig(
            n_routed_experts=63,
            top_k=7,
            expert_width=32,
            n_shared_experts=1,
            routed_scaling_factor=4.0,
        ),
    ),
    "course-devices": replace(
        _COURSE,
        moe=MoEConfig(
            n_routed_experts=64,
            top_k=6,
            expert_width=32,
            n_shared_experts=2,
            n_group=8,
            topk_group=8,
            routed_scaling_factor=4.0,
        ),
    ),  # 2 shared and 6 of 64 experts as in DeepSeekMoE 16B; 8 devices, and a token may reach all of them
    "course-v3": replace(
        _COURSE, moe=replace(V3_EXPERTS, n_routed_experts=64, expert_width=32)
    ),  # a quarter of DeepSeek-V3's 256 experts: a token uses 8, from 4 of 8 groups, and one shared expert
    "course-v4": replace(
        _COURSE,
        moe=MoEConfig(
            n_routed_experts=64,
            top_k=6,
            expert_width=32,
            n_shared_experts=1,
            scoring_func="sqrtsoftplus",
            expert_bias=True,
            norm_topk_prob=True,
            routed_scaling_factor=1.5,
            swiglu_limit=10.0,
        ),
        n_hash_layers=1,
    ),  # DeepSeek-V4-Flash with a quarter of its 256 experts; a table chooses in one of 2 layers, there in 3 of 43
    "dense-0.2B": _VALIDATION,
    "hash-2.0B": replace(_VALIDATION, moe=replace(_SWITCH, scoring_func="hash")),
    "switch-2.0B": replace(_VALIDATION, moe=_SWITCH),
    "gshard-2.0B": replace(_VALIDATION, moe=_GSHARD),
    "deepseekmoe-2B": replace(
        _VALIDATION,
        moe=MoEConfig(n_routed_experts=63, top_k=7, expert_width=853, n_shared_experts=1),
    ),
    "gshard-x1.2": replace(_VALIDATION, moe=replace(_GSHARD, expert_width=4096)),
    "gshard-x1.5": replace(_VALIDATION, moe=replace(_GSHARD, expert_width=5120)),
    # In the paper these are 4 and 16 experts that every token visits: together one FFN of 4 and 16 times the width.
    "dense-x4": replace(_VALIDATION, ffn_width=13653),
    "dense-x16": replace(_VALIDATION, ffn_width=54613),
} | FAMILY


def preset(name: str) -> ModelConfig:
    """Return the config called `name`. Raises InputError with the closest names if there is none."""
    if name in PRESETS:
        return PRESETS[name]
    close = get_close_matches(name, PRESETS, n=4, cutoff=0.4)
    candidates = f"close: {', '.join(close)}" if close else f"all: {', '.join(PRESETS)}"
    raise InputError(f"preset = {name!r}: there is none; {candidates}")
