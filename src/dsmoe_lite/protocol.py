"""How the paper's validation models are trained again at a size that its reader can run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsmoe_lite.config import ModelConfig, MoEConfig
from dsmoe_lite.errors import require_choice
from dsmoe_lite.job import CorpusConfig, Job
from dsmoe_lite.presets import preset
from dsmoe_lite.train import TrainConfig

STANDARD = preset("dense-0.2B").ffn_width  # one standard FFN of DeepSeekMoE (arXiv:2401.06066), Section 4.1
GATES = ("printed", "softmax", "sigmoid")


def _cut(m: int, n_shared_experts: int, n_routed_experts: int, top_k: int) -> ModelConfig:
    model = preset("deepseekmoe-2B")
    assert model.moe is not None
    moe = replace(model.moe, n_shared_experts=n_shared_experts, n_routed_experts=n_routed_experts, top_k=top_k)
    return replace(model, moe=replace(moe, expert_width=round(STANDARD / m)))


MODELS: dict[str, ModelConfig] = {
    # Tables 1, 2 and 9
    "dense": preset("dense-0.2B"),
    "dense-x4": preset("dense-x4"),
    "dense-x16": preset("dense-x16"),
    "hash": preset("hash-2.0B"),
    "switch": preset("switch-2.0B"),
    "gshard": preset("gshard-2.0B"),
    "gshard-x1.2": preset("gshard-x1.2"),
    "gshard-x1.5": preset("gshard-x1.5"),
    "deepseekmoe": preset("deepseekmoe-2B"),
    # Figure 3, between gshard and deepseekmoe
    "1+1-of-15": _cut(1, 1, 15, 1),
    "1+3-of-31": _cut(2, 1, 31, 3),
    # Section 4.4
    "0+8-of-64": _cut(4, 0, 64, 8),
    "2+6-of-62": _cut(4, 2, 62, 6),
    "4+4-of-60": _cut(4, 4, 60, 4),
    # Figure 6
    "1+3-of-63": _cut(4, 1, 63, 3),
}


@dataclass(frozen=True)
class Tier:
    """Sizes and schedule at which the models of the paper are trained again.

    `dense` has one standard FFN; every width of the paper is scaled as that one is. Gates: as printed, or the softmax
    or sigmoid scores of the chosen experts, not normalised; with `times_m` times m, the number of pieces that a
    standard expert is cut in.
    """

    dense: ModelConfig
    train: TrainConfig
    corpus: CorpusConfig
    vocab_size: int
    gates: str
    balance: float  # weight of the expert-level loss, DeepSeekMoE Eq 12
    times_m: bool = True
    lr: Mapping[str, float] = field(default_factory=dict)  # of models that have one of their own

    def __post_init__(self) -> None:
        require_choice("gates", self.gates, GATES)

    def job(self, name: str) -> Job:
        """The run of one of MODELS."""
        model = self.shrink(MODELS[name])
        balance = {"expert": self.balance} if model.moe and model.moe.scoring_func != "hash" else {}
        train = replace(self.train, balance=balance, lr=self.lr.get(name, self.train.lr))
        return Job(model, train, self.corpus, self.vocab_size)

    def shrink(self, model: ModelConfig) -> ModelConfig:
        """The model of the paper with this tier's sizes."""
        moe = model.moe and self._gated(replace(model.moe, expert_width=self._width(model.moe.expert_width)))
        return replace(self.dense, ffn_width=self._width(model.ffn_width), moe=moe)

    def _width(self, printed: int) -> int:
        return round(printed * self.dense.ffn_width / STANDARD)

    def _gated(self, moe: MoEConfig) -> MoEConfig:
        if self.gates == "printed" or moe.scoring_func == "hash":
            return moe
        pieces = max(1, round(self.dense.ffn_width / moe.expert_width)) if self.times_m else 1
        return replace(moe, scoring_func=self.gates, norm_topk_prob=False, routed_scaling_factor=float(pieces))
