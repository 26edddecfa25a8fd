"""Config files and configs in Python: what a person gets wrong is one line with the name, the value and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.yaml_files import read_yaml
from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig, to_dict
from dsmoe_lite.data.world import WorldConfig
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job, read_job

GOOD = "model: course-deepseekmoe\ntrain:\n  steps: 8\n"


def refused(tmp_path: Path, text: str) -> str:
    """The error of read_job for a file, without the file's name."""
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_job(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 700
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: course-dense\nmodel: course-gshard\n", "model is given twice in line 2"),
        (GOOD + "  lr: 1e-3\n  lr: 1e-2\n", "lr is given twice in line 5"),
        (GOOD + "train:\n  steps: 9\n", "train is given twice in line 4"),
        (GOOD + "  balance: {switch: 0.1, switch: 0.2}\n", "switch is given twice in line 4"),
        ('{"model": "course-dense", "model": "course-gshard"}', "model is given twice in line 1"),
        (GOOD + "masked: [{a: 1, a: 2}]\n", "a is given twice in line 4"),
    ],
)
def test_a_name_given_twice_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("masked: 0.5", "masked = 0.5: must be"),
        ("masked: {0.5: 1}", "masked = {0.5: 1}: must be"),
        ("masked: [0.5, half]", "half"),
        ("masked: [1.5]", "masked = 1.5: must be a finite number of at least 0 and at most 1"),
        ("masked: [0.99]", "share = 0.99: leaves"),
        ("active: 3", "active = 3: must be"),
        ("active: {2: 3}", "active = {2: 3}: must be"),
        ("active: [2.5]", "2.5"),
        ("active: [0]", "active = 0: must be a whole number of at least 1"),
        ("active: [4000]", "top_k = 4000: must be at most"),
        ("active: abc", "active = 'abc': must be"),
        ("corpus: world", "corpus = 'world': must be a mapping of names"),
        ("corpus: []", "corpus = []: must be a mapping of names"),
        ("corpus: {world: {shares: 1}}", "shares = 1: must be"),
        ("corpus: {world: {n_firsts: 4}}", "corpus.world.n_firsts = 4: no such field; did you mean n_first?"),
        ("vocab: 500", "vocab = 500: no such field; did you mean vocab_size?"),
        ("steps: 80", "steps = 80: no such field; there are model, train, corpus"),
        ("vocab_size: 0500", "vocab_size = '0500': must be int, not str"),
        ("vocab_size: 1:30", "vocab_size = '1:30': must be int, not str"),
        ("vocab_size: 1_000", "vocab_size = '1_000': must be int, not str"),
        ("vocab_size: 0x200", "vocab_size = '0x200': must be int, not str"),
        ("vocab_size: yes", "vocab_size = 'yes': must be int, not str"),
        ("vocab_size: " + "9" * 400, "vocab_size = 999"),
        ("vocab_size: " + "9" * 5000, "is not YAML"),
        ("vocab_size: 2001-99-99", "vocab_size = '2001-99-99'"),
        ("n_heldout_batches: true", "n_heldout_batches = True: must be"),
        ("device: [cpu]", "device = ['cpu']: must be str, not list"),
    ],
)
def test_a_wrong_value_is_named(tmp_path: Path, line: str, said: str) -> None:
    assert said in refused(tmp_path, GOOD + line + "\n")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("beta1: 1.0", "beta1 = 1.0: must be a finite number of at least 0 and below 1"),
        ("beta2: 1", "beta2 = 1"),
        ("beta1: -0.1", "beta1 = -0.1"),
        ("beta2: .nan", "beta2 = nan"),
        ("lr: .inf", "lr = inf: must be a finite number above 0"),
        ("lr: " + "9" * 400, "lr = 999"),
        ("lr: fast", "train.lr = 'fast': must be float, not str"),
        ("seq_len: 010", "train.seq_len = '010': must be int, not str"),
        ("seq_len: 08", "train.seq_len = '08'"),
        ("seq_len: 64.0", "train.seq_len = 64.0: must be int, not float"),
        ("batch_size: 1" + "0" * 30, "batch_size = 1000"),
        ("balance: switch", "train.balance = 'switch'"),
        ("balance: [switch]", "train.balance = ['switch']"),
        ("balance: {switch: high}", "high"),
        ("balance: {swich: 0.1}", "balance = 'swich': must be one of"),
        ("step: 9", "train.step = 9: no such field; did you mean steps?"),
        ("precision: fp16", "precision = 'fp16': must be one of auto, fp32, bf16"),
        ("precision: null", "train.precision = None"),
        ("steps: 9", "steps is given twice"),
    ],
)
def test_a_wrong_setting_of_training_is_named(tmp_path: Path, line: str, said: str) -> None:
    assert said in refused(tmp_path, GOOD + f"  {line}\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ), "values; must be at most 100000"),
        ("model: &m [*m]\n", "an alias contains itself"),
        ("model: &m {a: *m}\n", "an alias contains itself"),
        ("model: " + "[" * 20_000 + "]" * 20_000, "is nested too deeply"),
        ("model: " + "{a: " * 5_000 + "1" + "}" * 5_000, "is nested too deeply"),
        ("", "must be a mapping of names to values"),
        ("- 1\n", "must be a mapping"),
        ("model: *nothing\n", "is not YAML: found undefined alias"),
        ("model: !!python/object:os.system {}\n", "is not YAML: could not determine a constructor"),
        ("model: {course\n", "is not YAML"),
        ("model: [\0]\n", "is not YAML"),
        ("train: {steps: 8}\n", "model: is missing"),
        ("model: course-dense\n", "train: is missing"),
        ("model: {vocab_size: 300}\ntrain: {steps: 8}\n", "model.d_model: is missing"),
        ("model: course-dens\ntrain: {steps: 8}\n", "course-dense"),
        ("model: 5\ntrain: {steps: 8}\n", "model = 5: must be a mapping of names"),
        ("1: 2\nmodel: course-dense\n", "1 = 2: no such field"),
        ("? [1, 2]\n: 3\n", "is not YAML: found unhashable key"),
    ],
    ids=range(18),
)  # fmt: skip
def test_a_file_that_is_no_job_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    assert said in refused(tmp_path, text)


def test_files_of_other_bytes_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    for content, said in ((GOOD.encode("utf-16"), "is not UTF-8 text"), (b"\xff\xfe\x00", "is not UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=said):
            read_job(path)
    with pytest.raises(InputError, match="No such file"):
        read_job(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="Is a directory"):
        read_job(tmp_path)


def test_words_and_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(
        "a: [3e-3, 1.5, .5, 1., -2, +3, 0, 1E2]\nb: [true, False, ~, null, '']\nc: [yes, no, on, off, 010, 1:30, 08]\n"
        "base: &base {x: 1, y: 2}\nmore: {<<: *base, y: 3}\nempty:\n"
    )
    values = read_yaml(path)
    assert values["a"] == [3e-3, 1.5, 0.5, 1.0, -2, 3, 0, 100.0]
    assert [type(value) for value in values["a"]] == [float, float, float, float, int, int, int, float]
    assert values["b"] == [True, False, None, None, ""]
    assert values["c"] == ["yes", "no", "on", "off", "010", "1:30", "08"]
    assert values["more"] == {"x": 1, "y": 3}
    assert values["empty"] is None


def test_lists_become_tuples_and_aliases_share_settings(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(GOOD + "masked: [0, 0.25]\nactive: [1, 2]\ncorpus: {world: {shares: [1, 0, 0, 0, 0]}}\n")
    job = read_job(path)
    assert (job.masked, job.active, job.corpus.world.shares) == ((0, 0.25), (1, 2), (1, 0, 0, 0, 0))


# Configs in Python

LATENT = {"n_heads": 2, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 4}
DENSE: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 16,
    "n_layers": 2,
    "attention": AttentionConfig(n_heads=2, head_dim=8),
    "ffn_width": 24,
}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AttentionConfig(n_heads=2, head_dim=8, yarn=5), "yarn = 5: must be YarnConfig or None, not int"),
        (lambda: MLAConfig(**LATENT, yarn={}), "yarn = {}: must be YarnConfig or None, not dict"),
        (lambda: ModelConfig(**DENSE, moe=5), "moe = 5: must be MoEConfig or None, not int"),
        (lambda: ModelConfig(**DENSE | {"attention": None}), "attention = None: must be AttentionConfig or MLAConfig"),
        (lambda: ModelConfig(**DENSE | {"n_layers": 10**9}), "n_layers = 1000000000: must be .* at most 10000"),
        (lambda: ModelConfig(**DENSE | {"d_model": 2**64}), "d_model"),
        (lambda: Job(model=5, train=TrainConfig(steps=1)), "model = 5: must be ModelConfig, not int"),
        (lambda: Job(model=preset("course-dense"), train={"steps": 1}), "train = {'steps': 1}: must be TrainConfig"),
        (lambda: Job(model=preset("course-dense"), train=TrainConfig(steps=1), corpus="world"), "corpus = 'world'"),
        (lambda: Job(model=preset("course-gshard"), train=TrainConfig(steps=1), masked=0.5), "masked = 0.5: must be"),
        (lambda: CorpusConfig(world=3), "world = 3"),
        (lambda: CorpusConfig(kind=["world"]), "kind"),
        (lambda: TrainConfig(steps=1, balance=0.1), "balance = 0.1: must be dict"),
        (lambda: TrainConfig(steps=1, balance={1: 0.1}), "balance = 1: must be one of"),
        (lambda: WorldConfig(shares=0.5), "shares = 0.5"),
        (lambda: YarnConfig(factor=float("inf"), original_max_len=8), "factor = inf"),
        (lambda: YarnConfig(factor=10**400, original_max_len=8), "factor = 1000"),
        (lambda: MoEConfig(n_routed_experts=4, top_k=True, expert_width=8), "top_k = True"),
        (lambda: MoEConfig(n_routed_experts=4, top_k=np.bool_(True), expert_width=8), "top_k"),
        (lambda: MoEConfig(n_routed_experts=4, top_k=2.0, expert_width=8), "top_k = 2.0"),
        (lambda: MoEConfig(n_routed_experts=4, top_k=10**400, expert_width=8), "top_k = 1000"),
        (lambda: MoEConfig(n_routed_experts=4, top_k=10**5000, expert_width=8), "top_k = a number of thousands"),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, np.int16])
def test_whole_numbers_of_numpy_are_whole_numbers(kind: type) -> None:
    plain = MoEConfig(n_routed_experts=8, top_k=2, expert_width=16)
    ours = MoEConfig(n_routed_experts=kind(8), top_k=kind(2), expert_width=kind(16))
    assert json.dumps(to_dict(ours)) == json.dumps(to_dict(plain))
    train = TrainConfig(steps=kind(3), lr=np.float32(0.5), beta1=np.float64(0.9), seed=kind(4))
    assert json.dumps(to_dict(train)) == json.dumps(to_dict(TrainConfig(steps=3, lr=0.5, beta1=0.9, seed=4)))
    attention = AttentionConfig(n_heads=kind(2), head_dim=kind(8))
    model = ModelConfig(**DENSE | {"attention": attention, "vocab_size": np.int64(300), "norm_eps": np.float64(1e-6)})
    assert json.dumps(to_dict(model)) == json.dumps(to_dict(ModelConfig(**DENSE)))
