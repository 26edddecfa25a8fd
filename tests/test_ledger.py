"""The ledger of claims: every stored verdict follows from its data, and every link leads somewhere."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from dsmoe_lite.accounting import parameters
from dsmoe_lite.book import claims as book_page
from dsmoe_lite.book import scoreboard
from dsmoe_lite.cli import main
from dsmoe_lite.cli.claims import command
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import ModelConfig, from_dict
from dsmoe_lite.presets import preset
from dsmoe_lite.study import equations, grids, ledger, published
from dsmoe_lite.study.grids import Grid
from dsmoe_lite.study.ledger import METRICS, VERDICTS, Claim, Exact, Trend, by_id, differences, load, settle, write
from dsmoe_lite.study.published import as_printed
from dsmoe_lite.training.job import Job

CLAIMS = load()
FIELDS = {"grid": "small", "figure": "one", "model": "fine", "other": "coarse", "metric": "loss", "expected": "below"}
LINKED = [claim for claim in CLAIMS if claim.where]


def test_every_stored_verdict_follows_from_its_data() -> None:
    assert settle(CLAIMS) == CLAIMS


def test_the_ledger_has_sixty_claims_and_is_stored_as_written(tmp_path: Path) -> None:
    assert len(CLAIMS) >= 60
    assert {claim.verdict for claim in CLAIMS} <= set(VERDICTS)
    write(CLAIMS, tmp_path / "claims.yml")
    assert (tmp_path / "claims.yml").read_bytes() == ledger.PATH.read_bytes()


@pytest.mark.parametrize("claim", LINKED, ids=lambda claim: claim.id)
def test_a_claim_is_settled_under_a_heading_of_a_chapter(claim: Claim) -> None:
    number, heading = claim.where.split(", ", 1)
    (chapter,) = paths.NOTEBOOKS.glob(f"{number}_*.py")
    assert re.search(rf"^# ##+ {re.escape(heading)}$", chapter.read_text(encoding="utf-8"), re.MULTILINE)


def test_an_unsettled_claim_has_a_reason() -> None:
    for claim in CLAIMS:
        assert claim.why or claim.verdict not in ("not tested", "differs", "reversed"), claim.id
        assert (claim.verdict == "not tested") == (not claim.where), claim.id


def test_published_figures_are_in_published_json_too() -> None:
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
def test_numbers_are_formatted_as_printed(value: float, text: str) -> None:
    assert as_printed(value, text) == text


@pytest.mark.parametrize("text", ["about 3B", "3G", "", "3.B"])
def test_text_that_is_not_a_figure_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="figure"):
        as_printed(1.0, text)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of two models and five seeds without records, as compared by a Trend of FIELDS."""
    job = grids.grid("neighbours").jobs["course-dense"]
    monkeypatch.setitem(grids.GRIDS, "small", Grid({"fine": job, "coarse": job}))
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    monkeypatch.setattr(Job, "check_record", lambda self, record: None)  # records of these tests have only a loss
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
    record("fine", 2, 9.0)  # the other run of its pair is missing
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
    claim = Claim("x", "says", "source", "published", trend=Trend(**FIELDS))
    assert settle([claim])[0].verdict == "holds"
    assert [c.verdict for c in settle([claim, replace(claim, id="y")])] == ["leans", "leans"]
    elsewhere = replace(claim, id="y", trend=Trend(**FIELDS | {"figure": "another"}))
    assert [c.verdict for c in settle([claim, elsewhere])] == ["holds", "holds"]


def test_a_diverged_run_is_never_averaged(small: Path) -> None:
    fill({0: -0.5, 1: -0.4, 2: -0.6, 3: float("nan"), 4: -0.5})
    claim = Claim("x", "says", "source", "published", trend=Trend(**FIELDS))
    with pytest.raises(InputError, match="it has the value NaN"):
        settle([claim])
    record("fine", 3, 2.0, diverged="loss = nan at step 7")
    assert settle([claim])[0].ours == "n = 4, seeds missing or diverged: [3]"
    assert settle([claim])[0].verdict == "not tested"


def test_not_above_depends_on_its_margin(small: Path) -> None:
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
    ("entry", "message"),
    [
        ({"verdict": "true"}, "verdict = 'true'"),
        ({"exact": {"function": "guess", "arguments": {}}}, "function = 'guess'"),
        ({"trend": FIELDS | {"grid": "nothing"}}, "experiment = 'nothing'"),
        ({"trend": FIELDS | {"grid": "attention"}}, "model = 'fine'"),
        ({"trend": FIELDS | {"grid": "attention", "model": "mla", "other": "mha", "metric": "x"}}, "metric = 'x'"),
        ({"mood": "good"}, "mood"),
    ],
)
def test_a_bad_entry_is_named(entry: dict, message: str, tmp_path: Path) -> None:
    claim = {"id": "c", "says": "s", "source": "t", "published": "1"} | entry
    path = tmp_path / "claims.yml"
    path.write_text(yaml.safe_dump({"schema_version": 1, "claims": [claim]}), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(path)
    assert "claim 'c'" in str(error.value)
    assert "\n" not in str(error.value)


def test_another_schema_and_double_ids_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "claims.yml"
    path.write_text("schema_version: 2\nclaims: []\n", encoding="utf-8")
    with pytest.raises(InputError, match="schema_version = 2"):
        load(path)
    write([CLAIMS[0], CLAIMS[0]], path)
    with pytest.raises(InputError, match="an id must be unique"):
        load(path)


def test_a_claim_is_found_by_its_id() -> None:
    assert by_id(CLAIMS, "v2-cache-reduction").published == "93.3%"
    with pytest.raises(InputError, match="v2-cache-reduction"):
        by_id(CLAIMS, "v2-cache-reductions")


def test_the_command_prints_all_claims_and_a_tally() -> None:
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 0
    tally = Counter(claim.verdict for claim in CLAIMS)
    assert f"{tally['exact']} exact, {tally['differs']} differs" in result.output
    rows = json.loads(CliRunner().invoke(command, ["--json"]).output)
    assert [row["id"] for row in rows] == [claim.id for claim in CLAIMS]


def test_a_stored_verdict_that_does_not_follow_is_an_error(tmp_path, monkeypatch, capsys) -> None:
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


def prose(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())


def planned() -> list[Claim]:
    """The claims that the protocol fixed before its runs."""
    return [claim for claim in CLAIMS if claim.trend and claim.trend.grid == "paper" and not claim.trend.after_runs]


def test_readme_and_page_of_results_say_what_was_reproduced() -> None:
    of_paper = planned()
    verdicts = [claim.verdict for claim in of_paper]
    survivors = sum(bool(claim.survives) for claim in of_paper)
    readme, page = prose(paths.REPOSITORY / "README.md"), prose(paths.NOTEBOOKS / "pages" / "results.md")
    for text in (readme, page.replace("**", "")):
        assert f"{verdicts.count('holds')} of {len(verdicts)} claims hold" in text
    assert f"{survivors} of them also if corrected over all {len(verdicts)}" in readme
    assert f"**{survivors} of the {verdicts.count('holds')}** hold" in page
    assert f"Five of the {verdicts.count('holds')} could hardly have failed" in page
    assert sum(bool(claim.easy) for claim in of_paper) == 5
    assert all(claim.verdict == "holds" for claim in of_paper if claim.easy)
    assert verdicts.count("inconclusive") == 4
    assert verdicts.count("reversed") == 1
    assert "four stay undecided, one is reversed" in readme
    assert "pages/results.md" in readme
    undecided = (
        "two claims about shared experts, one about the finest experts, and one about half as many active experts"
    )
    assert "**Four stay undecided**" in page
    assert undecided in page
    assert {claim.id for claim in of_paper if claim.verdict == "inconclusive"} == {
        "moe-shared-helps", "moe-four-shared", "moe-finest-helps", "moe-half-active"
    }  # fmt: skip
    assert [claim.id for claim in CLAIMS if claim.verdict == "reversed" and "Figure 4" in claim.source] != []


def test_page_of_results_states_sizes_and_effects_as_they_are() -> None:
    page = prose(paths.NOTEBOOKS / "pages" / "results.md")
    jobs = grids.grid("paper").jobs
    sizes = sorted(parameters(from_dict(ModelConfig, r["model"])).total for r in grids.records("paper"))
    assert f"{sizes[0] / 1000:.0f} to {sizes[-1] / 1000:.0f} thousand weights" in page
    ours, theirs = (parameters(model).ffn.total for model in (jobs["gshard"].model, preset("gshard-2.0B")))
    assert theirs / ours == pytest.approx(20_000, rel=0.05)
    assert "a twenty-thousandth of the paper's expert parameters" in page
    swap = ledger.by_id(CLAIMS, "moe-shared-irreplaceable")
    assert swap.published == "1.808 to 2.414"
    assert swap.ours.startswith("+0.0203")
    assert "rises by 0.606" in page
    assert "ours by 0.020" in page


def test_every_claim_of_a_protocol_has_a_short_form_for_charts() -> None:
    fixed = [one for one in CLAIMS if one.trend and one.trend.grid in ("paper", "text-long", "common", "successors")]
    fixed = [one for one in fixed if not one.trend.after_runs]
    assert len(fixed) == 19 + 17 + 5 + 11
    assert [one.id for one in fixed if not 0 < len(one.short) <= 44] == []


def test_picture_of_claims_has_a_row_for_each() -> None:
    of_paper = planned()
    drawn = scoreboard.picture(CLAIMS)
    assert f"{len(of_paper)} claims of the DeepSeekMoE paper, tried again at toy size: 14 hold" in drawn
    assert f"{sum(bool(claim.survives) for claim in of_paper)} also if corrected over all" in drawn
    for claim in of_paper:
        label = claim.short
        sign = 1 if claim.trend.expected == "above" else -1
        mean = float(claim.ours.split(",")[0])
        effect = re.search(rf"{re.escape(label)}: {claim.verdict}, ([+-]\d\.\d{{3}})", drawn)
        assert float(effect[1]) == pytest.approx(sign * mean, abs=6e-4)
    assert drawn.count("<circle") == len(of_paper) - 1  # the effect of Figure 4 is an arrow


def test_a_settled_claim_is_not_under_way() -> None:
    assert [claim.id for claim in CLAIMS if "under way" in claim.why and claim.verdict != "not tested"] == []


def test_a_claim_links_to_its_heading() -> None:
    claim = replace(CLAIMS[0], where="07, Tables 2, 8 and 9: how good is it?")
    assert book_page._link(claim) == "[07](07_paper_experiments.ipynb#tables-2-8-and-9-how-good-is-it)"
    assert book_page._link(replace(claim, where="")) == "-"


OF_ANY_TEXT = ("rise, best experts masked", "logarithm of the loss")
REMOVED = {  # as much of a record as the metrics on real text read: 2 nats are 3 bits per byte
    "model": {"moe": {"n_routed_experts": 63}},
    "heldout_loss": 2.0,
    "heldout_bits_per_byte": {"all": 3.0, "python": 1.0},
    "masked": {str(1 / 63): {"heldout_loss": 2.2}, str(1 / 16): {"heldout_loss": 2.4}},
    "silenced": {"1": {"heldout_loss": 9.0}, "4": {"heldout_loss": 3.0}},
    "shared_swapped": {"heldout_loss": 2.6},
    "domain_use": {"trained": [{"uncertainty": 0.2}, {"uncertainty": 0.4}], "untrained": [0.1, 0.2]},
}


def test_metrics_on_real_text_are_rises_in_bits_per_byte() -> None:
    assert {name: METRICS[name](REMOVED) for name in METRICS if name not in OF_ANY_TEXT and _reads(name)} == (
        pytest.approx(
            {
                "loss": 2.0,
                "loss, shared expert swapped": 2.6,
                "bits per byte": 3.0,
                "rise, best sixteenth replaced": 0.6,
                "gain of replacements, best sixteenth": 0.9,
                "rise, shared expert swapped": 0.9,
                "rise, best routed expert replaced": 0.3,
                "domain in the choice": 0.3,
                "domain in the choice, untrained": 0.15,
            }
        )
    )
    coarse = REMOVED | {"model": {"moe": {"n_routed_experts": 16}}, "silenced": {"1": {"heldout_loss": 2.5}}}
    assert METRICS["gain of replacements, best sixteenth"](coarse) == pytest.approx(0.15)
    assert METRICS["rise, best routed expert replaced"](coarse) == pytest.approx(0.6)


def _reads(name: str) -> bool:
    try:
        METRICS[name](REMOVED)
    except KeyError:
        return False
    return True


def test_every_metric_reads_some_record() -> None:
    results = [record for name in ("balance", "needle") for record in grids.records(name)[:1]]
    changed = {"heldout_loss": 2.0}
    active = {"3": changed, "4": changed}
    results += [{"heldout_loss": 1.0, "masked": {"0.25": changed}, "active": active, "shared_swapped": changed}]
    results += [REMOVED]
    for name, metric in METRICS.items():
        values = []
        for result in results:
            try:
                values.append(metric(result))
            except KeyError:
                continue
        assert values, name
