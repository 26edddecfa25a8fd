"""A needle in a haystack: the rows, the weights of the loss, and the effect of other positions in a trained model."""

from dataclasses import replace

import pytest
import torch

from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import ModelConfig, YarnConfig, from_dict
from dsmoe_lite.data.needle import ASK, MARK, NeedleConfig, copy_batch, depth_bins, needle_batch
from dsmoe_lite.layers.rope import rope_tables
from dsmoe_lite.model import Transformer
from dsmoe_lite.study import needle
from dsmoe_lite.study.grids import grid, run_one
from dsmoe_lite.study.needle import KINDS, NeedleJob, Stage, needle_recall, pretrain, with_positions
from dsmoe_lite.study.rows import needle_gaps, needle_rows

CONFIG = NeedleConfig(n_keys=6, n_values=5, n_filler=4, n_distractors=2)
JOB = NeedleJob(
    model=replace(NeedleJob().model, vocab_size=CONFIG.vocab_size, d_model=16, max_seq_len=64),
    needle=CONFIG,
    stages=(
        Stage(rows="copy", seq_len=8, batch_size=4, steps=3),
        Stage(rows="needle", seq_len=16, batch_size=4, steps=9),
    ),
    yarn=YarnConfig(factor=4.0, original_max_len=16),
    extension=Stage(rows="needle", seq_len=64, batch_size=2, steps=2),
    probes=(1, 2),
    lengths=(16, 64),
    bins=2,
    per_bin=3,
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def kinds_of(config: NeedleConfig) -> dict[str, range]:
    return {
        "key": range(2, config.first_value),
        "value": range(config.first_value, config.first_filler),
        "filler": range(config.first_filler, config.vocab_size),
    }


# Rows


@pytest.mark.parametrize("spare", [0, 1, 2, 3, 48, 239])
@pytest.mark.parametrize("config", [CONFIG, NeedleConfig(), NeedleConfig(n_distractors=0)])
def test_a_row_is_needles_in_filler_and_a_question_for_one(config: NeedleConfig, spare: int) -> None:
    length = 3 * (config.n_distractors + 2) + 1 + spare
    batch, ids = needle_batch(config, 50, length, "test"), kinds_of(config)
    for row, start in zip(batch.tokens.tolist(), batch.starts.tolist(), strict=True):
        assert len(row) == length + 1
        marks = [position for position, token in enumerate(row) if token == MARK]
        assert len(marks) == 1 + config.n_distractors
        assert start in marks
        pairs = {row[mark + 1]: row[mark + 2] for mark in marks}
        assert len(pairs) == len(set(pairs.values())) == len(marks), "keys differ, and so do values"
        assert set(pairs) <= set(ids["key"])
        assert set(pairs.values()) <= set(ids["value"])
        assert row[-3:] == [ASK, row[start + 1], pairs[row[start + 1]]]
        rest = set(range(length - 2)) - {mark + i for mark in marks for i in range(3)}
        assert len(rest) == length - 2 - 3 * len(marks), "needles overlap neither each other nor the question"
        assert {row[position] for position in rest} <= set(ids["filler"])


def test_the_answer_is_only_in_its_needle() -> None:
    batch = needle_batch(CONFIG, 200, 30, "leak")
    answers = batch.tokens[:, -1]
    positions = (batch.tokens[:, :-1] == answers[:, None]).nonzero()
    assert torch.equal(positions[:, 1], batch.starts + 2)


def test_every_depth_is_equally_likely() -> None:
    n_starts = CONFIG.n_starts(20)
    assert n_starts == 16  # 0 to 15: a needle at 15 ends at 17, before ASK at 18
    counts = needle_batch(CONFIG, 16_000, 20, "depth").starts.bincount(minlength=n_starts)
    assert len(counts) == n_starts
    assert counts.min() > 850  # 1000 each, standard deviation 31
    assert counts.max() < 1150


def test_distractors_are_everywhere() -> None:
    batch = needle_batch(CONFIG, 4000, 20, "where")
    marks = (batch.tokens == MARK).sum(dim=0) - batch.starts.bincount(minlength=21)
    assert marks[:16].min() > 0
    assert marks[16:].sum() == 0


def test_filler_follows_zipfs_law() -> None:
    config = replace(CONFIG, n_filler=3, zipf=1.0, n_distractors=0)
    tokens = needle_batch(config, 2000, 40, "zipf").tokens
    counts = tokens.flatten().bincount(minlength=config.vocab_size)[config.first_filler :].double()
    assert (counts / counts.sum()).tolist() == pytest.approx([6 / 11, 3 / 11, 2 / 11], abs=0.01)


def test_a_key_fixes_the_rows() -> None:
    one, same, other = (needle_batch(CONFIG, 8, 30, "seed", seed) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    assert needle_batch(CONFIG, 1, 13, 0).tokens[0].tolist() == PINNED_ROW
    copies = [copy_batch(CONFIG, 8, 30, "seed", seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], copies[2])


@pytest.mark.parametrize(("length", "bins"), [(64, 8), (13, 3), (21, 17)])
def test_bins_partition_the_depths(length: int, bins: int) -> None:
    n_starts = CONFIG.n_starts(length)
    batches = depth_bins(CONFIG, length, bins, 400, "bins")
    starts = [set(batch.starts.tolist()) for batch in batches]
    assert [set(range(n_starts)) & part for part in starts] == starts
    assert set().union(*starts) == set(range(n_starts))
    for part in range(bins):
        assert starts[part] == {start for start in range(n_starts) if start * bins // n_starts == part}
    assert all(batch.weights.sum() == 400 for batch in batches)


def test_the_loss_is_taken_at_answers_and_repeated_tokens() -> None:
    batch = needle_batch(CONFIG, 5, 20, "loss")
    assert batch.weights.nonzero().tolist() == [[row, 19] for row in range(5)]
    copies = copy_batch(CONFIG, 40, 24, "loss")
    for row, weights, period in zip(
        copies.tokens.tolist(), copies.weights.tolist(), copies.starts.tolist(), strict=True
    ):
        assert 3 <= period <= 12
        assert row[period:] == row[: len(row) - period]
        # target t is token t + 1; the row determines it from token period + 1 on, after the repetition has begun
        assert weights == [float(target + 1 > period) for target in range(24)]
    assert set(copies.starts.tolist()) == set(range(3, 13))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: NeedleConfig(n_keys=3), "n_keys = 3: must be a whole number above n_distractors = 3"),
        (lambda: NeedleConfig(n_values=2.5), "n_values = 2.5"),
        (lambda: NeedleConfig(n_filler=0), "n_filler = 0"),
        (lambda: NeedleConfig(zipf=-1.0), "zipf = -1.0"),
        (lambda: needle_batch(CONFIG, 1, 12), "seq_len = 12: must be a whole number of at least 13"),
        (lambda: needle_batch(CONFIG, 0, 20), "batch_size = 0"),
        (lambda: copy_batch(CONFIG, 1, 7), "seq_len = 7"),
        (lambda: depth_bins(CONFIG, 13, 10, 1), "bins = 10: must be a whole number of at least 1 and at most 9"),
        (lambda: depth_bins(CONFIG, 13, 2, 0), "per_bin = 0"),
        (lambda: Stage(rows="prose", seq_len=64, batch_size=8, steps=1), "rows = 'prose': must be one of copy, needle"),
        (lambda: Stage(rows="copy", seq_len=64, batch_size=8, steps=0), "steps = 0"),
        (lambda: replace(JOB, needle=NeedleConfig()), "vocab_size = 17: must be 50, as in the needle config"),
        (lambda: replace(JOB, lengths=(16, 65)), "max_seq_len = 64: must be at least 65, the longest row"),
        (lambda: replace(JOB, probes=(3,)), "probes = 3"),
        (lambda: replace(JOB, lr=0.0), "lr = 0.0"),
        (lambda: with_positions(Transformer(JOB.model), "longer", JOB.yarn), "kind = 'longer': must be one of plain"),
    ],
)
def test_bad_input_is_one_line(wrong, message: str) -> None:
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as raised:
        wrong()
    assert "\n" not in str(raised.value)


# Models


@pytest.fixture(scope="module")
def pretrained() -> tuple[Transformer, list[dict]]:
    return pretrain(JOB)


def test_a_seed_fixes_the_trained_model(pretrained: tuple[Transformer, list[dict]]) -> None:
    model, curve = pretrained
    again, same_curve = pretrain(JOB)
    other, _ = pretrain(JOB.seeded(1, 5))
    assert curve == same_curve
    assert [(row["step"], row["rows"], row["seq_len"]) for row in curve] == [
        (0, "copy", 8), (10, "needle", 16), (11, "needle", 16),
    ]  # fmt: skip
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert not torch.equal(model.embed.weight, other.embed.weight)


def test_the_loss_of_a_step_is_that_of_the_answer_alone() -> None:
    torch.manual_seed(0)
    model = Transformer(JOB.model)
    batch = needle_batch(CONFIG, 4, 16, "learn", 0, 0)
    loss = torch.nn.functional.cross_entropy(model(batch.tokens[:, :-1]).logits[:, -1], batch.tokens[:, -1])
    job = replace(JOB, stages=(Stage(rows="needle", seq_len=16, batch_size=4, steps=1),))
    torch.manual_seed(0)
    twin = Transformer(JOB.model)
    config = needle.TrainConfig(steps=1, lr=1e-3)
    curve = needle._fit(twin, job.stages, CONFIG, config, ("learn", 0))
    assert curve[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert not torch.equal(twin.embed.weight, model.embed.weight)


def test_an_easy_needle_is_learnt_in_a_hundred_steps() -> None:
    config = NeedleConfig(n_keys=2, n_values=3, n_filler=2, n_distractors=0)
    model = replace(NeedleJob().model, vocab_size=config.vocab_size, d_model=32)
    stages = (
        Stage(rows="copy", seq_len=8, batch_size=16, steps=60),
        Stage(rows="needle", seq_len=12, batch_size=16, steps=40),
    )
    curve = pretrain(NeedleJob(model=model, needle=config, stages=stages))[1]
    assert curve[-1]["right"] > 0.9


def test_a_loss_that_is_not_finite_is_one_line() -> None:
    with pytest.raises(RunError, match="loss = nan at step 2: lower lr = 1e"):
        pretrain(replace(JOB, lr=1e30))


def test_recall_equals_a_count_by_hand(
    pretrained: tuple[Transformer, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle, "EVALUATION_ROWS", 4)  # parts of 4, 4 and 2 rows
    model = pretrained[0]
    bins = depth_bins(CONFIG, 30, 3, 10, "count")
    model.train()
    shares = needle_recall(model, bins)
    assert model.training
    model.eval()
    for share, batch in zip(shares, bins, strict=True):
        n_right = 0
        for row in batch.tokens:
            logits = model(row[None, :-1]).logits[0, -1].tolist()
            n_right += logits.index(max(logits)) == row[-1]
        assert share == n_right / 10


class PerfectModel(torch.nn.Module):
    """A model that looks up the key."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(1, 1)

    def forward(self, tokens: torch.Tensor):
        logits = torch.zeros(*tokens.shape, CONFIG.vocab_size)
        for number, row in enumerate(tokens.tolist()):
            logits[number, -1, row[row.index(row[-1]) + 1]] = 1.0
        return type("Output", (), {"logits": logits})


def test_looking_up_the_key_finds_every_needle() -> None:
    assert needle_recall(PerfectModel(), depth_bins(CONFIG, 40, 4, 10, "all")) == [1.0] * 4


# Positions


def scores_of(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens).logits


def test_kinds_have_their_frequencies_and_scale(pretrained: tuple[Transformer, list[dict]]) -> None:
    model, attention = pretrained[0], JOB.model.attention
    by_kind = {kind: with_positions(model, kind, JOB.yarn) for kind in KINDS}
    plain = rope_tables(attention.rope_dim, 64)
    yarn = rope_tables(attention.rope_dim, 64, yarn=JOB.yarn)
    slow = rope_tables(attention.rope_dim, 256)
    sharp = (0.1 * torch.tensor(4.0).log().item() + 1) ** 2
    for kind, (cos, sin), factor in (
        ("plain", plain, 1.0), ("sharper", plain, sharp), ("yarn", yarn, sharp), ("yarn-frequencies", yarn, 1.0),
    ):  # fmt: skip
        torch.testing.assert_close(by_kind[kind].rope.on(torch.device("cpu")), (cos, sin))
        for block in by_kind[kind].blocks:
            assert block.attention.scale == pytest.approx(factor / attention.qk_dim**0.5)
    # an interpolated model rotates position 4 p as the plain model rotates position p
    interpolated = by_kind["interpolated"]
    torch.testing.assert_close(interpolated.rope.on(torch.device("cpu"))[0][::4], plain[0][:16])
    assert interpolated.blocks[0].attention.scale == pytest.approx(attention.qk_dim**-0.5)
    assert slow[0].shape[0] == 256
    for other in by_kind.values():
        assert other is not model
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tokens = needle_batch(CONFIG, 2, 30, "tokens").tokens
    assert torch.equal(scores_of(by_kind["plain"], tokens), scores_of(model, tokens))
    others = [scores_of(by_kind[kind], tokens) for kind in KINDS[1:]]
    assert not any(torch.equal(a, scores_of(model, tokens)) for a in others)


def test_pairs_turn_as_the_docstring_of_the_job_says() -> None:
    job = NeedleJob()
    turns = 64 * needle.rope_frequencies(16) / (2 * torch.pi)
    assert turns[0].item() == pytest.approx(10.2, abs=0.05)
    assert (turns > 1).sum() == 3
    assert turns[2].item() == pytest.approx(1.0, abs=0.05)
    shares = (needle.rope_frequencies(16, yarn=job.yarn) / needle.rope_frequencies(16)).tolist()
    assert shares == pytest.approx([1, 0.75, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25])


# Records


def test_a_run_records_every_kind_length_and_depth() -> None:
    model = pretrain(JOB)[0]
    record = run_one(JOB)
    assert set(record["recall"]) == {*KINDS, "plain-extended", "interpolated-extended", "yarn-extended"}
    for by_length in record["recall"].values():
        assert {length: len(bins) for length, bins in by_length.items()} == {"16": 2, "64": 2}
    assert record["recall"]["plain"]["16"] == needle_recall(model, JOB.questions(16))
    for kind, extension in record["extension"].items():
        assert set(extension["recall"]) == {"1", "2"}
        assert [row["step"] for row in extension["curve"]] == [0, 1]
        assert extension["recall"]["2"] == pytest.approx(sum(record["recall"][f"{kind}-extended"]["64"]) / 2)
    assert from_dict(NeedleJob, record["job"]) == JOB
    assert from_dict(ModelConfig, record["job"]["model"]) == JOB.model


def test_rows_and_gaps_of_records() -> None:
    plan = grid("needle")
    assert plan.job("mla", 3) == NeedleJob(seed=3)
    records = [
        {"seed": 1, "recall": {"a": {"64": [1.0, 0.5]}, "b": {"64": [0.25, 0.25]}}},
        {"seed": 0, "recall": {"a": {"64": [1.0, 1.0]}, "b": {"64": [0.0, 0.5]}}},
    ]
    rows = needle_rows(records, {"b": "B"})
    assert rows[0] == {"kind": "B", "length": 64, "depth": 0.25, "recall": 0.25, "seed": 1}
    assert [(row["depth"], row["recall"]) for row in rows[2:]] == [(0.25, 0.0), (0.75, 0.5)]
    assert needle_gaps(records, "a", "b", 64) == {0: 0.75, 1: 0.5}


PINNED_ROW = [16, 14, 0, 3, 9, 0, 2, 8, 0, 6, 10, 1, 2, 8]
