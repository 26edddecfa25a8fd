"""The first call of every chapter: parameters checked, packages found, charts on, threads and seed fixed."""

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsmoe_lite.common.machine import require_profile
from dsmoe_lite.labs.guesses import Guesses
from dsmoe_lite.labs.packages import require_packages
from dsmoe_lite.labs.session import check_parameters

T = TypeVar("T")


@dataclass(frozen=True)
class Lab:
    """The conditions that a chapter runs under."""

    profile: str  # "smoke", "cpu" or "gpu"
    device: str  # "cuda" with profile gpu, else "cpu"
    own: bool  # whether all parameters but profile and seed are the chapter's own: claims are recorded for these alone
    guesses: Guesses = field(repr=False, default_factory=Guesses)

    def ask(self, key: str, *choices: str, low: float = 0.0, high: float = 0.0) -> None:
        """Ask the reader a question, at the top of the cell that has the answer (`Guesses.ask`)."""
        self.guesses.ask(key, *choices, low=low, high=high)

    def answer(self, key: str, right: str | float, words: str = "", *, within: float = 0.0) -> None:
        """Give the answer (`Guesses.answer`)."""
        self.guesses.answer(key, right, words, within=within)

    def score(self) -> None:
        """Score the reader's guesses (`Guesses.score`)."""
        self.guesses.score()

    def choose(self, *, smoke: T, cpu: T, gpu: T) -> T:
        """Return the value for this run's profile."""
        return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[self.profile]


def begin(namespace: MutableMapping[str, Any], *packages: str) -> Lab:
    """Start a chapter: call `begin(globals())` in the cell after the parameters.

    Checks the parameters (as `check_parameters`), the packages that every chapter needs and those in `packages`; then
    switches the charts on, sets one thread (small matrices gain little from more, and results repeat) and seeds torch.
    Raises InputError for a parameter out of its range, a package that is missing, or profile gpu without a GPU.
    """
    own = check_parameters(namespace)
    require_packages("torch", "altair", "vl_convert", "tokenizers", *packages)
    import torch

    from dsmoe_lite.viz import renderer

    profile = namespace["profile"]
    require_profile(profile)
    renderer.enable()
    torch.set_num_threads(1)
    torch.manual_seed(namespace["seed"])
    return Lab(profile, "cuda" if profile == "gpu" else "cpu", own)
