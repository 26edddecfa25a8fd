"""The ledger: every stored verdict follows from its data, and points at what is there."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dsmoe_lite.book import claims as book_page
from dsmoe_lite.cli import main
from dsmoe_lite.cli.claims import command
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.study import equations, grids, ledger, published
from dsmoe_lite.study.grids import Grid
from dsmoe_lite.study.ledger import METRICS, VERDICTS, Claim, Exact, Trend, by_id, differences, load, settle, write
from dsmoe_lite.study.published import as_printed
from dsmoe_lite.training.job import Job

CLAIMS = load()
FIELDS = {"grid": "small", "figure": "one", "model": "fine", "other": "coarse", "metric": "loss", "expected": "below"}
PLACED = [claim for claim in CLAIMS if claim.where]


def test_every_stored_verdict_follows_from_its_data() -> None:
    assert settle(CLAIMS) == CLAIMS


def test_the_ledger_is_as_large_as_promised_and_stored_as_it_is_written(tmp_path: Path) -> None:
    assert len(CLAIMS) >= 60
    assert {claim.verdict for claim in CLAIMS} <= set(VERDICTS)
    write(CLAIMS, tmp_path / "claims.yml")
    assert (tmp_path / "claims.yml").read_bytes() == ledger.PATH.read_bytes()


@pytest.mark.parametrize("claim", PLACED, ids=lambda claim: claim.id)
def test_a_claim_is_settled_under_a_heading_of_a_chapter(claim: Claim) -> None:
    number, heading = claim.where.split(", ", 1)
    (chapter,) = paths.NOTEBOOKS.glob(f"{number}_*.py")
    assert re.search(rf"^# ##+ {re.escape(heading)}$", chapter.read_text(encoding="utf-8"), re.MULTILINE)


def test_what_is_not_settled_says_why() -> None:
    for claim in CLAIMS:
        assert claim.why or claim.verdict not in ("not tested", "differs", "reversed"), claim.id
        assert (claim.verdict == "not tested") == (not claim.where), claim.id


def test_published_figures_stand_in_published_json_too() -> None:
    text = json.dumps(published.load())
    for claim in CLAIMS:
        if claim.exact is not None and claim.id != "v2-cache-in-groups":
            assert re.search(rf'[" ]{re.escape(claim.published.replace(",", ""))}[",\]}}]', text), claim.id
            assert claim.source in text, claim.id


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4.333e12, "4.3T"),
        (235.7e9, "236B"),
        (110_592, "110.6K"),
        (70_272, "70.272 KB"),
        (0.8224, "82.2%"),
        (4_426_165_368, "4,426,165,368"),
        (120, "120"),
        (1.5896, "1.590"),
    ],
)
def test_numbers_as_they_are_printed(value: float, text: str) -> None:
    assert as_printed(value, text) == text


@pytest.mark.parametrize("text", ["about 3B", "3G", "", "3.B"])
def test_what_is_no_figure_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="figure"):
        as_printed(1.0, text)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of two models and five seeds, without a record; what a Trend of FIELDS compares."""
    job = grids.grid("neighbours").jobs["course-dense"]
    monkeypatch.setitem(grids.GRIDS, "small", Grid({"fine": job, "coarse": job}))
    monkeypatch.setattr(grids, "DATA", tmp_path)
    monkeypatch.setattr(Job, "check_record", lambda self, record: None)  # they hold a loss and nothing else
    return tmp_path


def record(model: str, seed: int, loss: float, **values: str) -> None:
    path = grids.record_path("small", model, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"heldout_loss": loss, **values}), encoding="utf-8")


def fill(gaps: dict[int, float]) -> None:
    for seed, gap in gaps.items():
        record("fine", seed, 2 + gap)
        record("coarse", seed, 2.0)


def test_a_trend_pairs_seeds(small: Path) -> None:
    fill({0: -0.5, 1: 0.25})
    record("fine", 2, 9.0)  # its pair is missing
    assert differences(Trend(**FIELDS), grids.records("small")) == {0: -0.5, 1: 0.25}
    claim = Claim("x", "says", "source", "published", trend=Trend(**FIELDS))
    (settled,) = settle([claim])
    assert (settled.verdict, settled.ours) == ("not tested", "n = 2, seeds missing or diverged: [2, 3, 4]")


def test_verdicts_of_a_trend(small: Path) -> None:
    fill({0: -0.5, 1: -0.4, 2: -0.6, 3: -0.5, 4: -0.5})
    claim = Claim("x", "says", "source", "published", trend=Trend(**FIELDS))
    assert settle([claim])[0].verdict == "holds"
    assert settle([replace(claim, trend=Trend(**FIELDS | {"expected": "above"}))])[0].verdict == "reversed"
    equal = Trend(**FIELDS | {"expected": "equal", "margin": 0.1})
    assert settle([replace(claim, trend=equal)])[0].verdict == "reversed"
    assert settle([replace(claim, trend=replace(equal, margin=1.0))])[0].verdict == "holds"


def test_claims_of_one_figure_are_corrected_together(small: Path) -> None:
    fill({0: -0.5, 1: -0.2, 2: -0.5, 3: -0.05, 4: -0.2})  # p = 0.032
    alone = Claim("x", "says", "source", "published", trend=Trend(**FIELDS))
    assert settle([alone])[0].verdict == "holds"
    assert [c.verdict for c in settle([alone, replace(alone, id="y")])] == ["leans", "leans"]
    elsewhere = replace(alone, id="y", trend=Trend(**FIELDS | {"figure": "another"}))
    assert [c.verdict for c in settle([alone, elsewhere])] == ["holds", "holds"]


def test_a_diverged_run_is_never_averaged(small: Path) -> None:
    fill({0: -0.5, 1: -0.4, 2: -0.6, 3: float("nan"), 4: -0.5})
    claim = Claim("x", "says", "source", "published", trend=Trend(**FIELDS))
    with pytest.raises(InputError, match="difference = nan"):
        settle([claim])
    record("fine", 3, 2.0, diverged="loss = nan at step 7")
    assert settle([claim])[0].ours == "n = 4, seeds missing or diverged: [3]"
    assert settle([claim])[0].verdict == "not tested"


def test_no_worse_is_a_question_of_its_margin(small: Path) -> None:
    fill({0: -0.5, 1: -0.4, 2: -0.6, 3: -0.5, 4: -0.5})
    no_worse = Trend(**FIELDS | {"expected": "not above", "margin": 0.1})
    claim = Claim("x", "says", "source", "published", trend=no_worse)
    assert settle([claim])[0].verdict == "holds"
    swapped = replace(no_worse, model="coarse", other="fine")
    assert settle([replace(claim, trend=swapped)])[0].verdict == "reversed"
    assert settle([replace(claim, trend=replace(swapped, margin=0.6))])[0].verdict == "holds"
    assert settle([replace(claim, trend=replace(swapped, margin=0.55))])[0].verdict == "inconclusive"


def test_an_exact_claim_that_fails_differs() -> None:
    claim = Claim("x", "says", "source", "121", exact=Exact("combinations", {"n": 16, "k": 2}))
    (settled,) = settle([claim])
    assert (settled.ours, settled.verdict) == ("120", "differs")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"verdict": "true"}, "verdict = 'true'"),
        ({"exact": {"function": "guess", "arguments": {}}}, "function = 'guess'"),
        ({"trend": FIELDS | {"grid": "nothing"}}, "experiment = 'nothing'"),
        ({"trend": FIELDS | {"grid": "attention"}}, "model = 'fine'"),
        ({"trend": FIELDS | {"grid": "attention", "model": "mla", "other": "mha", "metric": "x"}}, "metric = 'x'"),
        ({"mood": "good"}, "mood"),
    ],
)
def test_a_bad_entry_is_named(entry: dict, words: str, tmp_path: Path) -> None:
    claim = {"id": "c", "says": "s", "source": "t", "published": "1"} | entry
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump({"schema_version": 1, "claims": [claim]}), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(words)) as error:
        load(path)
    assert "claim 'c'" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_schema_and_double_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "claims.yml"
    path.write_text("schema_version: 2\nclaims: []\n", encoding="utf-8")
    with pytest.raises(InputError, match="schema_version = 2"):
        load(path)
    write([CLAIMS[0], CLAIMS[0]], path)
    with pytest.raises(InputError, match="an id stands for one claim"):
        load(path)


def test_a_claim_by_its_id() -> None:
    assert by_id(CLAIMS, "v2-cache-reduction").published == "93.3%"
    with pytest.raises(InputError, match="v2-cache-reduction"):
        by_id(CLAIMS, "v2-cache-reductions")


def test_the_command_prints_all_and_its_tally() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    tally = Counter(claim.verdict for claim in CLAIMS)
    assert f"{tally['exact']} exact, {tally['differs']} differs" in result.output
    rows = json.loads(CliRunner().invoke(command, ["--json"]).output)
    assert [row["id"] for row in rows] == [claim.id for claim in CLAIMS]


def test_a_stored_verdict_that_does_not_follow_fails(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "claims.yml"
    write([replace(CLAIMS[0], verdict="differs")], path)
    monkeypatch.setattr(ledger, "PATH", path)
    monkeypatch.setattr(book_page, "PAGE", tmp_path / "claims.md")
    with pytest.raises(SystemExit) as stop:
        main(["claims"])
    assert stop.value.code == 1
    assert f"{CLAIMS[0].id}: not what is stored" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["claims", "--write"])
    assert stop.value.code in (0, None)
    assert load(path) == [CLAIMS[0]]
    assert CLAIMS[0].says in (tmp_path / "claims.md").read_text(encoding="utf-8")


def test_the_page_of_the_book_shows_every_claim_once() -> None:
    text = book_page.PAGE.read_text(encoding="utf-8")
    assert text == book_page.page(CLAIMS, equations.load()), "run dsmoe claims --write"
    assert [text.count(f"| {claim.says} <br>") for claim in CLAIMS] == [1] * len(CLAIMS)


def test_readme_says_what_was_reproduced() -> None:
    verdicts = [claim.verdict for claim in CLAIMS if claim.trend and claim.trend.grid == "paper"]
    readme = " ".join((paths.REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    assert f"{verdicts.count('holds')} of {len(verdicts)} claims hold" in readme
    assert verdicts.count("inconclusive") == 4
    assert "for four claims, of shared experts, of the finest cut and of half the active experts" in readme
    assert [claim.id for claim in CLAIMS if claim.verdict == "reversed" and "Figure 4" in claim.source] != []


def test_a_settled_claim_is_not_under_way() -> None:
    assert [claim.id for claim in CLAIMS if "under way" in claim.why and claim.verdict != "not tested"] == []


def test_a_claim_links_to_its_heading() -> None:
    place = replace(CLAIMS[0], where="07, Tables 2, 8 and 9: how good is it?")
    assert book_page._link(place) == "[07](07_paper_experiments.ipynb#tables-2-8-and-9-how-good-is-it)"
    assert book_page._link(replace(place, where="")) == "-"


def test_every_metric_reads_some_record() -> None:
    found = [record for name in ("balance", "needle") for record in grids.records(name)[:1]]
    changed = {"heldout_loss": 2.0}
    found += [{"heldout_loss": 1.0, "masked": {"0.25": changed}, "active": {"4": changed}, "shared_swapped": changed}]
    for name, metric in METRICS.items():
        values = []
        for one in found:
            try:
                values.append(metric(one))
            except KeyError:
                continue
        assert values, name
