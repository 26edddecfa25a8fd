"""The replication checked from outside: its verdicts by numpy alone, its history, and what it finds by chance."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import pytest
import yaml

from dsmoe_lite.common import paths

CLAIMS = yaml.safe_load((paths.DATA / "claims.yml").read_text(encoding="utf-8"))["claims"]
TRENDS = [claim for claim in CLAIMS if "trend" in claim and claim["verdict"] != "not tested"]
GRIDS = sorted({claim["trend"]["grid"] for claim in TRENDS})
ANGLES = np.linspace(0, np.pi / 2, 20_001)


def records(name: str) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for path in sorted((paths.DATA / "runs" / name).glob("*.json")):
        model, seed = path.stem.rsplit("-seed", 1)
        record = json.loads(path.read_text(encoding="utf-8"))
        if "diverged" not in record:
            found[model, int(seed)] = record
    return found


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


def bits(record: dict[str, Any], result: dict[str, float]) -> float:
    """The loss of one result of a run in bits per byte: all results are of the same text."""
    return result["heldout_loss"] / record["heldout_loss"] * record["heldout_bits_per_byte"]["all"]


def sixteenth(record: dict[str, Any], how: str) -> dict[str, float]:
    """The result without each token's best sixteenth of the experts: the larger of the one or two numbers removed."""
    return record[how][max(record[how], key=float)]


VALUES: dict[str, Callable[[dict[str, Any]], float]] = {
    "loss": lambda r: r["heldout_loss"],
    "logarithm of the loss": lambda r: float(np.log(r["heldout_loss"])),
    "recall, frequent people": lambda r: r["recall"]["head"],
    "recall, rare people": lambda r: r["recall"]["tail"],
    "MaxVio": lambda r: mean(layer["max_vio"] for layer in r["heldout_experts"]),
    "loss, shared expert swapped": lambda r: r["shared_swapped"]["heldout_loss"],
    "loss, 3 routed experts": lambda r: r["active"]["3"]["heldout_loss"],
    "loss, 4 routed experts": lambda r: r["active"]["4"]["heldout_loss"],
    "rise, best experts masked": lambda r: mean(x["heldout_loss"] - r["heldout_loss"] for x in r["masked"].values()),
    "bits per byte": lambda r: r["heldout_bits_per_byte"]["all"],
    "rise, best sixteenth replaced": lambda r: bits(r, sixteenth(r, "masked")) - bits(r, r),
    "gain of replacements, best sixteenth": lambda r: (
        bits(r, sixteenth(r, "silenced")) - bits(r, sixteenth(r, "masked"))
    ),
    "rise, shared expert swapped": lambda r: bits(r, r["shared_swapped"]) - bits(r, r),
    "rise, best routed expert replaced": lambda r: bits(r, r["masked"][min(r["masked"], key=float)]) - bits(r, r),
    "domain in the choice": lambda r: mean(layer["uncertainty"] for layer in r["domain_use"]["trained"]),
    "domain in the choice, untrained": lambda r: mean(r["domain_use"]["untrained"]),
    "needles at 256, RoPE": lambda r: mean(r["recall"]["plain"]["256"]),
    "needles at 256, YaRN": lambda r: mean(r["recall"]["yarn"]["256"]),
    "needles at 256, RoPE trained on": lambda r: mean(r["recall"]["plain-extended"]["256"]),
    "needles at 256, YaRN trained on": lambda r: mean(r["recall"]["yarn-extended"]["256"]),
}


@cache
def area(degrees: int) -> np.ndarray:
    """The share of Student's distribution between 0 and sqrt(n) tan(a), where the density of a is cos(a)^(n - 1)."""
    density = np.cos(ANGLES) ** (degrees - 1)
    steps = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return steps / steps[-1]


def beyond(t: float, degrees: int) -> float:
    """The probability that Student's t exceeds `t`."""
    upper = 0.5 * (1 - np.interp(np.arctan(abs(t) / sqrt(degrees)), ANGLES, area(degrees)))
    return float(upper if t >= 0 else 1 - upper)


@cache
def critical(degrees: int) -> float:
    """The point beyond which 2.5% lie."""
    return sqrt(degrees) * np.tan(np.interp(0.95, area(degrees), ANGLES))


def differences(trend: dict[str, Any]) -> np.ndarray:
    runs = records(trend["grid"])
    value, other_value = VALUES[trend["metric"]], VALUES[trend.get("other_metric", trend["metric"])]

    def gap(model: str, other: str) -> np.ndarray:
        return np.array([value(runs[model, s]) - other_value(runs[other, s]) for s in seeds])

    models = [trend["model"], trend["other"], *trend.get("control", [])]
    seeds = sorted({s for _, s in runs if all((model, s) in runs for model in models)})
    found = gap(trend["model"], trend["other"])
    return found - gap(*trend["control"]) if "control" in trend else found


def summary(trend: dict[str, Any], found: np.ndarray) -> dict[str, float]:
    """Mean, interval and p-value of one claim."""
    n, error = len(found), found.std(ddof=1) / sqrt(len(found))
    half = critical(n - 1) * error
    margin, average = trend.get("margin", 0.0), found.mean()
    below_margin = 1 - beyond((average - margin) / error, n - 1)
    above_margin = beyond((average + margin) / error, n - 1)
    p = {
        "equal": max(below_margin, above_margin),
        "not above": below_margin,
        "below": 2 * beyond(abs(average / error), n - 1),
        "above": 2 * beyond(abs(average / error), n - 1),
    }[trend["expected"]]
    return {"mean": average, "low": average - half, "high": average + half, "p": p}


def verdict(trend: dict[str, Any], found: dict[str, float], corrected: float) -> str:
    margin = trend.get("margin", 0.0)
    if trend["expected"] in ("equal", "not above"):
        reversed_ = found["low"] > margin or (trend["expected"] == "equal" and found["high"] < -margin)
        as_expected = True
    else:
        as_expected = (found["mean"] > 0) == (trend["expected"] == "above")
        reversed_ = not as_expected and corrected < 0.05
    if reversed_:
        return "reversed"
    if as_expected and corrected < 0.05:
        return "holds"
    return "leans" if as_expected and found["p"] < 0.05 else "inconclusive"


Results = dict[str, tuple[dict[str, float], float, str]]  # of each claim: its tests, the corrected p-value, the verdict


def verdicts(claims: list[dict[str, Any]], gaps: dict[str, np.ndarray]) -> Results:
    """The results of all claims, corrected within each figure by Holm's method."""
    results = {}
    for figure in {claim["trend"]["figure"] for claim in claims}:
        family = [claim for claim in claims if claim["trend"]["figure"] == figure]
        found = {claim["id"]: summary(claim["trend"], gaps[claim["id"]]) for claim in family}
        corrected = 0.0
        for rank, claim in enumerate(sorted(family, key=lambda claim: found[claim["id"]]["p"])):
            result = found[claim["id"]]
            corrected = max(corrected, min(1.0, (len(family) - rank) * result["p"]))
            results[claim["id"]] = (result, corrected, verdict(claim["trend"], result, corrected))
    return results


def test_every_verdict_follows_from_the_records() -> None:
    results = verdicts(TRENDS, {claim["id"]: differences(claim["trend"]) for claim in TRENDS})
    for claim in TRENDS:
        result, corrected, found = results[claim["id"]]
        assert claim["verdict"] == found, claim["id"]
        stated = claim["ours"].replace(",", "").split()
        assert [float(stated[0]), float(stated[3]), float(stated[5])] == pytest.approx(
            [result["mean"], result["low"], result["high"]], abs=6e-5
        ), claim["id"]
        assert float(stated[stated.index("corrected") + 1]) == pytest.approx(corrected, rel=0.06), claim["id"]


def test_claims_of_a_protocol_are_also_corrected_over_all_of_them() -> None:
    family = [claim for claim in TRENDS if "over all" in claim["ours"]]
    planned = {"paper": 19, "text-long": 17, "common": 5, "successors": 11}
    by_grid = {name: [claim for claim in family if claim["trend"]["grid"] == name] for name in planned}
    assert len(by_grid["paper"]) == 19
    assert all(len(claims) in (0, planned[name]) for name, claims in by_grid.items())  # none before runs are complete
    assert len(family) == sum(map(len, by_grid.values()))
    for name, claims in by_grid.items():
        together = [claim | {"trend": claim["trend"] | {"figure": name}} for claim in claims]
        results = verdicts(together, {claim["id"]: differences(claim["trend"]) for claim in claims})
        for claim in claims:
            assert float(claim["ours"].split()[-1]) == pytest.approx(results[claim["id"]][1], rel=0.06), claim["id"]
            assert claim.get("survives") == (results[claim["id"]][1] < 0.05 if claim["verdict"] == "holds" else None)


@pytest.mark.parametrize(("t", "degrees", "p"), [(2.262157, 9, 0.025), (2.776445, 4, 0.025), (-1.833113, 9, 0.95)])
def test_students_distribution_agrees_with_printed_tables(t: float, degrees: int, p: float) -> None:
    assert beyond(t, degrees) == pytest.approx(p, abs=1e-6)


def test_without_effects_at_most_one_family_in_twenty_shows_one() -> None:
    """The whole ledger on made-up losses: every model's are drawn from one distribution.

    An effect is a claim of a difference that holds, or any claim that is reversed. That a difference is below a margin
    is then true, and no effect.
    """
    rng, shown = np.random.default_rng(0), []
    n_seeds = {name: len({seed for _, seed in records(name)}) for name in GRIDS}
    for _ in range(500):
        losses: dict[tuple[str, ...], np.ndarray] = {}
        gaps = {}
        for claim in TRENDS:
            trend = claim["trend"]
            metrics = [trend["metric"], trend.get("other_metric", trend["metric"])]
            models = [trend["model"], trend["other"], *trend.get("control", [])]
            drawn = [
                losses.setdefault((trend["grid"], *key), rng.normal(0, 0.01, n_seeds[trend["grid"]]))
                for key in zip(models, 2 * metrics, strict=False)
            ]
            gaps[claim["id"]] = drawn[0] - drawn[1] - (drawn[2] - drawn[3] if "control" in trend else 0)
        results = verdicts(TRENDS, gaps)
        effects = {
            claim["id"]
            for claim in TRENDS
            if results[claim["id"]][2] == "reversed"
            or (results[claim["id"]][2] == "holds" and "margin" not in claim["trend"])
        }
        by_figure: dict[str, list[str]] = {}
        for claim in TRENDS:
            by_figure.setdefault(claim["trend"]["figure"], []).append(claim["id"])
        shown += [not effects.isdisjoint(ids) for ids in by_figure.values()]
    assert np.mean(shown) <= 0.05 + 3 * sqrt(0.05 * 0.95 / len(shown))
    assert np.mean(shown) > 0.005  # these tests can find what is not there


MANIFEST = paths.DATA / "runs" / "MANIFEST.json"


def test_no_record_was_changed_or_dropped() -> None:
    """The manifest lists the sha256 of every record; `tests/test_replication.py` writes it if it is run as a script."""
    assert json.loads(MANIFEST.read_text(encoding="utf-8")) == manifest(), "run python -m tests.test_replication"


def manifest() -> dict[str, str]:
    files = sorted(path for path in (paths.DATA / "runs").rglob("*.json") if path != MANIFEST)
    return {
        path.relative_to(MANIFEST.parent).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


def git(*arguments: str) -> str:
    command = ["git", "-C", str(paths.REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def has_history() -> bool:
    try:
        return git("rev-parse", "--is-shallow-repository") == "false"
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.skipif(not has_history(), reason="needs the history of the repository: git clone without --depth")
@pytest.mark.parametrize(
    ("page", "grids"),
    [
        ("notebooks/07_protocol.md", ("paper", "paper-gates")),
        ("notebooks/07_text_protocol.md", ("text-long", "text-short")),
        ("notebooks/07_common_protocol.md", ("common",)),
        ("notebooks/13_protocol.md", ("successors",)),
    ],
)
def test_the_protocol_is_older_than_its_runs_and_no_run_was_changed(page: str, grids: tuple[str, ...]) -> None:
    (frozen,) = git("log", "--diff-filter=A", "--format=%H", "--", page).splitlines()
    for name in grids:
        folder = f"data/runs/{name}"
        assert git("log", "--diff-filter=MDR", "--format=%H", "--", folder) == ""
        for commit in git("log", "--diff-filter=A", "--format=%H", "--", folder).splitlines():
            subprocess.run(
                ["git", "-C", str(paths.REPOSITORY), "merge-base", "--is-ancestor", frozen, commit], check=True
            )
        for path in sorted((paths.DATA / "runs" / name).glob("*.json")):
            made_at = json.loads(path.read_text(encoding="utf-8"))["provenance"]["commit"]
            assert git("merge-base", frozen, made_at) == frozen, path.name


if __name__ == "__main__":
    MANIFEST.write_text(json.dumps(manifest(), indent=1) + "\n", encoding="utf-8")
