"""Configs of experts: each that cannot work is refused in one line, and the remedy that the line names works."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dsmoe_lite.accounting import parameters
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig, from_dict, to_dict
from dsmoe_lite.layers.moe import MoELayer
from dsmoe_lite.model import Transformer
from dsmoe_lite.training.job import Job
from dsmoe_lite.training.train import TrainConfig, train

BASE: dict[str, Any] = {"n_routed_experts": 8, "top_k": 2, "expert_width": 4}
HASH = {"scoring_func": "hash", "top_k": 1}
TABLE = {"chooser": "hash"}
EXPERT = {"chooser": "expert"}
GSHARD = {"second_choice": "random", "norm_topk_prob": True}

# What is wrong, the field that the line starts with, words of the remedy, a change that follows it
REFUSED: list[tuple[dict[str, Any], str, str, dict[str, Any]]] = [
    ({"top_k": 9}, "top_k = 9", "must be at most n_routed_experts = 8", {"top_k": 8}),
    ({"top_k": 0}, "top_k = 0", "must be a whole number of at least 1", {"top_k": 1}),
    ({"top_k": 1.0}, "top_k = 1.0", "must be a whole number", {"top_k": 1}),
    ({"n_routed_experts": 0}, "n_routed_experts = 0", "of at least 1", {"n_routed_experts": 2}),
    ({"expert_width": 0}, "expert_width = 0", "of at least 1", {"expert_width": 1}),
    ({"n_shared_experts": -1}, "n_shared_experts = -1", "of at least 0", {"n_shared_experts": 0}),
    ({"n_group": 3}, "n_group = 3", "must divide n_routed_experts = 8", {"n_group": 4}),
    ({"n_group": 0}, "n_group = 0", "of at least 1", {"n_group": 1}),
    ({"n_group": 16, "topk_group": 2}, "n_group = 16", "must divide n_routed_experts = 8", {"n_group": 8}),
    ({"n_group": 2, "topk_group": 3}, "topk_group = 3", "must be at most n_group = 2", {"topk_group": 2}),
    ({"n_group": 4, "topk_group": 0}, "topk_group = 0", "of at least 1", {"topk_group": 1}),
    ({"n_group": 4, "top_k": 3}, "top_k = 3", "must be at most 2: topk_group = 1 groups hold 2 experts", {"top_k": 2}),
    ({"n_group": 4, "topk_group": 2, "top_k": 5}, "top_k = 5", "groups hold 4 experts", {"top_k": 4}),
    (
        {"n_group": 8, "topk_group": 2, "group_score": "top2"},
        "group_score = 'top2'",
        "needs two experts per group; n_group = 8 leaves one",
        {"n_group": 4},
    ),
    (
        {"scoring_func": "relu"},
        "scoring_func = 'relu'",
        "softmax, sigmoid, sqrtsoftplus, hash",
        {"scoring_func": "sigmoid"},
    ),
    ({"chooser": "tokens"}, "chooser = 'tokens'", "one of token, expert", {"chooser": "token"}),
    ({"group_score": "mean"}, "group_score = 'mean'", "one of max, top2", {"group_score": "max"}),
    ({"second_choice": "none"}, "second_choice = 'none'", "one of all, random", {"second_choice": "all"}),
    ({**GSHARD, "top_k": 3}, "second_choice = 'random'", "needs top_k = 2", {"top_k": 2}),
    ({"second_choice": "random"}, "second_choice = 'random'", "and norm_topk_prob = True", {"norm_topk_prob": True}),
    ({"noisy_gating": "no"}, "noisy_gating = 'no'", "must be True or False", {"noisy_gating": False}),
    ({"expert_bias": 1}, "expert_bias = 1", "must be True or False", {"expert_bias": True}),
    ({"scale_normalised": None}, "scale_normalised = None", "must be True or False", {"scale_normalised": False}),
    ({"top_k": 1, "norm_topk_prob": True}, "norm_topk_prob = True", "must be False", {"norm_topk_prob": False}),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor = 0.0", "number above 0", {"routed_scaling_factor": 0.5}),
    ({"routed_scaling_factor": math.nan}, "routed_scaling_factor = nan", "above 0", {"routed_scaling_factor": 16}),
    ({"capacity_factor": -1.0}, "capacity_factor = -1.0", "a finite number above 0", {"capacity_factor": 1.25}),
    ({"capacity_factor": 0}, "capacity_factor = 0", "a finite number above 0", {"capacity_factor": None}),
    ({"eval_capacity_factor": math.inf}, "eval_capacity_factor = inf", "finite", {"eval_capacity_factor": 2.0}),
    (
        {"n_group": 2, "group_capacity_factor": math.nan},
        "group_capacity_factor = nan",
        "a finite number above 0",
        {"group_capacity_factor": 1.0},
    ),
    ({"group_capacity_factor": 1.0}, "group_capacity_factor = 1.0", "n_group of at least 2", {"n_group": 2}),
    ({"never_drop_share": 1.1}, "never_drop_share = 1.1", "at most 1", {"never_drop_share": 1.0}),
    ({**HASH, "top_k": 2}, "top_k = 2", "must be 1 with scoring_func = 'hash'", {"top_k": 1}),
    ({**HASH, "chooser": "expert"}, "chooser = 'expert'", "must be 'token'", {"chooser": "token"}),
    ({**HASH, "noisy_gating": True}, "noisy_gating = True", "must be False", {"noisy_gating": False}),
    ({**HASH, "expert_bias": True}, "expert_bias = True", "must be False", {"expert_bias": False}),
    ({**HASH, "n_group": 2}, "n_group = 2", "must be 1 with scoring_func = 'hash'", {"n_group": 1}),
    ({**TABLE, "noisy_gating": True}, "noisy_gating = True", "the table alone chooses", {"noisy_gating": False}),
    ({**TABLE, "expert_bias": True}, "expert_bias = True", "the table alone chooses", {"expert_bias": False}),
    ({**TABLE, "n_group": 2}, "n_group = 2", "must be 1 with chooser = 'hash'", {"n_group": 1}),
    ({**TABLE, **GSHARD}, "second_choice = 'random'", "must be 'all' with chooser = 'hash'", {"second_choice": "all"}),
    ({"swiglu_limit": 0}, "swiglu_limit = 0", "a finite number above 0", {"swiglu_limit": 10.0}),
    ({"swiglu_limit": 10.0, "backend": "cuda"}, "backend = 'cuda'", "no swiglu_limit", {"backend": "auto"}),
    ({**EXPERT, "noisy_gating": True}, "noisy_gating = True", "must be False", {"noisy_gating": False}),
    ({**EXPERT, "expert_bias": True}, "expert_bias = True", "must be False", {"expert_bias": False}),
    ({**EXPERT, "n_group": 2}, "n_group = 2", "must be 1 with chooser = 'expert'", {"n_group": 1}),
    ({**EXPERT, "norm_topk_prob": True}, "norm_topk_prob = True", "must be False", {"norm_topk_prob": False}),
    ({**EXPERT, "second_choice": "random"}, "second_choice = 'random'", "must be 'all'", {"second_choice": "all"}),
    ({**EXPERT, "capacity_factor": 1.0}, "capacity_factor = 1.0", "must be None", {"capacity_factor": None}),
    ({**EXPERT, "eval_capacity_factor": 2.0}, "eval_capacity_factor = 2.0", "None", {"eval_capacity_factor": None}),
    ({**EXPERT, "group_capacity_factor": 1.0}, "group_capacity_factor = 1.0", "None", {"group_capacity_factor": None}),
    ({"routing_groups": 2}, "routing_groups = 2", "must be 1 if", {"routing_groups": 1}),
    ({"backend": "fast"}, "backend = 'fast'", "one of loop", {"backend": "loop"}),
]


def one_line(error: pytest.ExceptionInfo[InputError], field: str, remedy: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith(f"{field}: "), said
    assert remedy in said


@pytest.mark.parametrize(("wrong", "field", "remedy", "change"), REFUSED)
def test_what_cannot_work_is_one_line_and_its_remedy_works(
    wrong: dict[str, Any], field: str, remedy: str, change: dict[str, Any]
) -> None:
    with pytest.raises(InputError) as error:
        MoEConfig(**(BASE | wrong))
    one_line(error, field, remedy)
    with pytest.raises(InputError):
        from_dict(MoEConfig, BASE | wrong)
    config = MoEConfig(**(BASE | wrong | change))
    MoELayer(6, config, 16)(torch.randn(2, 3, 6), torch.zeros(2, 3, dtype=torch.int64))


def test_every_field_is_refused_somewhere() -> None:
    named = {field.split(" = ")[0] for _, field, _, _ in REFUSED}
    assert named == set(to_dict(MoEConfig(**BASE)))


# The model


def model(n_layers: int, **values: Any) -> ModelConfig:
    return ModelConfig(
        vocab_size=40,
        d_model=12,
        n_layers=n_layers,
        attention=AttentionConfig(n_heads=2, head_dim=6),
        ffn_width=10,
        **values,
    )


@pytest.mark.parametrize(
    ("n_layers", "wrong", "field", "remedy"),
    [
        (4, {"interleave": 5}, "interleave = 5", "must be at most 4"),
        (4, {"interleave": 3, "n_dense_layers": 2}, "interleave = 3", "must be at most 2, the layers that n_dense"),
        (4, {"interleave": 0}, "interleave = 0", "of at least 1"),
        (4, {"n_dense_layers": 4}, "n_dense_layers = 4", "must be below n_layers = 4"),
        (4, {"n_dense_layers": 5}, "n_dense_layers = 5", "at most 4"),
        (4, {"n_hash_layers": 5}, "n_hash_layers = 5", "must be at most 4, the layers with experts"),
        (4, {"n_hash_layers": 3, "n_dense_layers": 2}, "n_hash_layers = 3", "must be at most 2"),
        (4, {"n_hash_layers": -1}, "n_hash_layers = -1", "of at least 0"),
    ],
)
def test_a_model_without_a_block_of_experts_is_refused(
    n_layers: int, wrong: dict[str, Any], field: str, remedy: str
) -> None:
    with pytest.raises(InputError) as error:
        model(n_layers, moe=MoEConfig(**BASE), **wrong)
    one_line(error, field, remedy)


@pytest.mark.parametrize("values", [HASH, EXPERT, {"noisy_gating": True}])
def test_hash_layers_need_others_that_choose_by_score(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as error:
        model(4, n_hash_layers=1, moe=MoEConfig(**{**BASE, **values, "top_k": 1}))
    one_line(error, "n_hash_layers = 1", "must be 0 unless the other layers choose by scores without noise")


@pytest.mark.parametrize(("n_dense", "interleave", "n_hash", "expected"), [
    (0, 1, 2, ["hash", "hash", "token", "token", "token"]),
    (1, 2, 1, [None, None, "hash", None, "token"]),
    (2, 1, 3, [None, None, "hash", "hash", "hash"]),
])  # fmt: skip
def test_a_table_chooses_in_the_first_layers_with_experts(
    n_dense: int, interleave: int, n_hash: int, expected: list[str | None]
) -> None:
    moe = MoEConfig(**BASE, expert_bias=True, n_group=2, topk_group=2, scoring_func="sqrtsoftplus", norm_topk_prob=True)
    config = model(5, moe=moe, n_dense_layers=n_dense, interleave=interleave, n_hash_layers=n_hash)
    assert [None if m is None else m.chooser for m in map(config.moe_of, range(5))] == expected
    assert [m.expert_bias for m in config.moe_layers] == [c == "token" for c in expected if c]
    built = Transformer(config)
    assert [layer.router.config for layer in built.moe_layers] == config.moe_layers
    tables = [layer.router.hash_table for layer in built.moe_layers if layer.router.config.chooser == "hash"]
    assert len({tuple(table.flatten().tolist()) for table in tables}) == n_hash  # each layer has its own
    tokens = torch.randint(40, (2, 6))
    for routing, m in zip(built(tokens).routings, config.moe_layers, strict=True):
        if m.chooser == "hash":
            assert all(len(set(ids)) == m.top_k for ids in routing.topk_ids.tolist())
    assert parameters(config).total == sum(weight.numel() for weight in built.parameters())
    assert from_dict(ModelConfig, to_dict(config)) == config


def test_a_hash_layer_has_no_groups_and_no_random_second_choice() -> None:
    limited = MoEConfig(**BASE, n_group=2, topk_group=2, group_capacity_factor=1.0)
    gshard = MoEConfig(**BASE, **GSHARD)
    for moe in (limited, gshard):
        Transformer(model(2, moe=moe, n_hash_layers=1))
        assert (moe.for_hash_layer().group_capacity_factor, moe.for_hash_layer().second_choice) == (None, "all")


def test_a_dense_model_may_say_anything_of_its_experts() -> None:
    dense = model(2, n_dense_layers=2, interleave=7)
    assert not any(dense.is_moe_layer(layer) for layer in range(2))


@pytest.mark.parametrize("interleave", [1, 2, 3, 5])
@pytest.mark.parametrize("n_dense", [0, 1, 2])
def test_every_nth_block_after_the_dense_ones_holds_experts(n_dense: int, interleave: int) -> None:
    config = model(7, moe=MoEConfig(**BASE, n_shared_experts=1), n_dense_layers=n_dense, interleave=interleave)
    expected, waited = [], 0
    for layer in range(7):
        waited += layer >= n_dense
        if waited == interleave:
            expected.append(layer)
            waited = 0
    assert [layer for layer in range(7) if config.is_moe_layer(layer)] == expected
    built = Transformer(config)
    assert [i for i, block in enumerate(built.blocks) if isinstance(block.ffn, MoELayer)] == expected
    assert [layer.router.layer for layer in built.moe_layers] == expected
    assert len(built(torch.zeros(1, 3, dtype=torch.int64)).routings) == len(expected)
    counted = parameters(config)
    assert counted.total == sum(weight.numel() for weight in built.parameters())
    assert counted.routed_experts.total == len(expected) * 8 * 3 * 12 * 4
    assert counted.dense_ffn.total == (7 - len(expected)) * 3 * 12 * 10


def test_glam_and_deepseekmoe() -> None:
    glam = model(6, moe=MoEConfig(**BASE), interleave=2)
    assert [layer for layer in range(6) if glam.is_moe_layer(layer)] == [1, 3, 5]
    deepseek = model(6, moe=MoEConfig(**BASE), n_dense_layers=1)
    assert [layer for layer in range(6) if deepseek.is_moe_layer(layer)] == [1, 2, 3, 4, 5]


# Training


@pytest.mark.parametrize(
    ("weights", "field", "remedy"),
    [
        ({"device": 0.1, "switch": 0.0}, "balance weight of device = 0.1", "needs a model with n_group > 1"),
        ({"communication": 0.1}, "balance weight of communication = 0.1", "needs a model with n_group > 1"),
        ({"load": 0.1}, "balance weight of load = 0.1", "needs a model with noisy_gating"),
    ],
)
def test_a_loss_that_does_not_fit_the_model_is_refused(weights: dict[str, float], field: str, remedy: str) -> None:
    config = TrainConfig(steps=1, balance=weights)
    with pytest.raises(InputError) as error:
        train(Transformer(model(1, moe=MoEConfig(**BASE))), None, config)  # type: ignore[arg-type]
    one_line(error, field, remedy)


@pytest.mark.parametrize("change", [{"expert_bias": True}, {"n_group": 4, "topk_group": 2}])
def test_the_load_loss_is_for_the_plain_choice(change: dict[str, Any]) -> None:
    moe = MoEConfig(**BASE, noisy_gating=True)
    config = TrainConfig(steps=1, balance={"load": 0.1})
    with pytest.raises(InputError) as error:
        train(Transformer(model(1, moe=replace(moe, **change))), None, config)  # type: ignore[arg-type]
    one_line(error, "balance weight of load = 0.1", "without expert_bias, and topk_group = n_group")


EXPERTS_CHOOSE, EVERY = MoEConfig(**BASE | EXPERT), MoEConfig(**BASE)
NEEDS: list[tuple[MoEConfig | None, dict[str, Any], str, str]] = [
    (EVERY, {"bias_speed": 0.1}, "bias_speed = 0.1", "needs a model with expert_bias"),
    (None, {"bias_speed": 0.1}, "bias_speed = 0.1", "needs a model with expert_bias"),
    (None, {"balance": {"device": 0.1}}, "balance weight of device = 0.1", "needs a model with n_group > 1"),
    (EVERY, {"balance": {"communication": 0.1}}, "balance weight of communication = 0.1", "needs a model with n_group"),
    (None, {"balance": {"load": 0.1}}, "balance weight of load = 0.1", "needs a model with noisy_gating"),
    (EXPERTS_CHOOSE, {"balance": {"sequence": 0.1}}, "balance weight of sequence = 0.1", "chooser = 'expert'"),
]


@pytest.mark.parametrize(("moe", "asked", "field", "remedy"), NEEDS)
def test_what_a_model_lacks_is_refused_by_job_and_training(
    moe: MoEConfig | None, asked: dict[str, Any], field: str, remedy: str
) -> None:
    config = TrainConfig(steps=1, seq_len=8, **asked)
    with pytest.raises(InputError) as error:
        train(Transformer(model(1, moe=moe)), None, config)  # type: ignore[arg-type]
    one_line(error, field, remedy)
    with pytest.raises(InputError) as error:
        Job(model=model(1, moe=moe), train=config)
    one_line(error, field, remedy)


def test_other_losses_and_weights_of_zero_are_nothing_to_a_dense_model() -> None:
    Job(model=model(1), train=TrainConfig(steps=1, balance={"switch": 0.1, "sequence": 0.1, "device": 0.0}))


@pytest.mark.parametrize(
    ("wrong", "field", "remedy"),
    [
        ({"balance": {"swich": 0.1}}, "balance = 'swich'", "importance, load, gshard, switch, z, expert, sequence"),
        ({"balance": {"z": -0.1}}, "balance weight of z = -0.1", "of at least 0"),
        ({"balance": {"z": math.nan}}, "balance weight of z = nan", "a finite number"),
        ({"bias_speed": -0.1}, "bias_speed = -0.1", "of at least 0"),
        ({"bias_kappa": 2.0}, "bias_kappa = 2.0", "needs a bias_speed above 0"),
        ({"bias_kappa": -2.0, "bias_speed": 0.1}, "bias_kappa = -2.0", "of at least 0"),
        ({"global_batch": True}, "global_batch = True", "needs a balance weight of expert or device"),
        ({"global_batch": 1, "balance": {"expert": 0.1}}, "global_batch = 1", "must be True or False"),
        ({"bias_speed": math.inf}, "bias_speed = inf", "a finite number"),
    ],
)
def test_weights_and_speed_are_checked(wrong: dict[str, Any], field: str, remedy: str) -> None:
    with pytest.raises(InputError) as error:
        TrainConfig(steps=1, **wrong)
    one_line(error, field, remedy)
