"""The models that the course ships: what the records say of them, and how much room they take."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.config import from_dict, to_dict
from dsmoe_lite.data.batches import Batch, heldout_batches
from dsmoe_lite.data.corpus import Corpus
from dsmoe_lite.evaluate import heldout_loss
from dsmoe_lite.study.grids import grid, records
from dsmoe_lite.training.job import corpus_of

SHIPPED = sorted((DATA / "models").glob("paper-*.safetensors"))
MOST_BYTES = 15_000_000  # of all of them together
NAME = re.compile(r"paper-(?P<model>[\w-]+)-seed(?P<seed>\d)(?:-step(?P<step>\d+))?\.safetensors")


def parts(path: Path) -> tuple[str, int, int | None]:
    found = NAME.fullmatch(path.name)
    assert found, f"{path.name} is not named as `dsmoe replay` names it"
    return found["model"], int(found["seed"]), found["step"] and int(found["step"])


def test_pairs_of_five_seeds_are_shipped_and_small() -> None:
    whole = {parts(path)[:2] for path in SHIPPED if parts(path)[2] is None}
    assert whole == {(model, seed) for model in ("gshard", "deepseekmoe") for seed in range(5)}
    assert sum(path.stat().st_size for path in SHIPPED) < MOST_BYTES


@pytest.fixture(scope="module")
def held_out() -> tuple[Corpus, list[Batch]]:
    """The text that records were evaluated on: the same for all runs of the grid."""
    facts, job = read_metadata(SHIPPED[0]), grid("paper").job("gshard", 0)
    corpus, tokenizer = corpus_of(facts), Tokenizer.from_str(facts["tokenizer"])
    return corpus, heldout_batches(corpus, tokenizer, 64, job.train.seq_len, job.n_heldout_batches)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_model_is_of_its_run(path: Path, held_out: tuple[Corpus, list[Batch]]) -> None:
    model, seed, step = parts(path)
    (record,) = (r for r in records("paper") if (r["model_name"], r["seed"]) == (model, seed))
    facts = read_metadata(path)
    assert facts["corpus"]["sha256"] == record["corpus"]["sha256"]
    found = load_model(path)
    assert to_dict(found.config) == to_dict(from_dict(type(found.config), record["model"]))
    if step is None:
        corpus, batches = held_out
        loss = heldout_loss(found, batches, corpus.domains).loss
        assert loss == pytest.approx(record["heldout_loss"], abs=1e-4)  # another machine rounds otherwise
