"""The protocol of chapter 07: the paper's validation models, scaled down to a size that a reader can train."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsmoe_lite.accounting import parameters
from dsmoe_lite.common.errors import require, require_choice
from dsmoe_lite.config import AttentionConfig, ModelConfig
from dsmoe_lite.data.world import WorldConfig
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job

VERSION = 1  # of the protocol, notebooks/07_protocol.md
MASKED = (1 / 16, 2 / 16, 3 / 16, 4 / 16)  # Figure 4: shares of each token's top experts
ACTIVE = (3, 4, 5, 6)  # Figure 5: routed experts per token; training has 7
STANDARD = preset("dense-0.2B").ffn_width  # one standard FFN of DeepSeekMoE (arXiv:2401.06066), Section 4.1
GATES = ("printed", "softmax", "softmax x m", "sigmoid", "sigmoid x m", "normalised x m")


def _finer(m: int, n_shared_experts: int, n_routed_experts: int, top_k: int) -> ModelConfig:
    """DeepSeekMoE 2B with experts of 1 / m of a standard FFN."""
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
    # Figure 3, between gshard and deepseekmoe; the first is GShard with DeepSeekMoE's kind of gates
    "0+2-of-16": _finer(1, 0, 16, 2),
    "1+1-of-15": _finer(1, 1, 15, 1),
    "1+3-of-31": _finer(2, 1, 31, 3),
    # Section 4.4
    "0+8-of-64": _finer(4, 0, 64, 8),
    "2+6-of-62": _finer(4, 2, 62, 6),
    "4+4-of-60": _finer(4, 4, 60, 4),
    # Figure 6
    "1+3-of-63": _finer(4, 1, 63, 3),
}


# Total and active parameters of FFNs and experts, in standard FFNs, which the paper holds equal. gshard-x1.2 is left
# out, because its experts are 1.2 standard FFNs wide only up to rounding to whole channels.
UNITS = {
    "dense": (1, 1),
    "dense-x4": (4, 4),
    "dense-x16": (16, 16),
    **dict.fromkeys(("hash", "switch", "1+3-of-63"), (16, 1)),
    **dict.fromkeys(("gshard", "deepseekmoe", "0+2-of-16", "1+1-of-15", "1+3-of-31"), (16, 2)),
    **dict.fromkeys(("0+8-of-64", "2+6-of-62", "4+4-of-60"), (16, 2)),
    "gshard-x1.5": (24, 3),
}


def _family(name: str) -> str:
    """A family shares a learning rate and gates; models named by their experts, as in 1+3-of-31, are DeepSeekMoE."""
    if MODELS[name].moe is None:
        return "dense"
    return name.split("-")[0] if name[0].isalpha() else "deepseekmoe"


FAMILIES = {name: _family(name) for name in MODELS}


@dataclass(frozen=True)
class Tier:
    """The sizes and the schedule with which the models of the paper are trained.

    `dense` has one standard FFN; every width of the paper is scaled by the same ratio. The gates of a family are as
    printed, which is the default, or the softmax or sigmoid scores of the chosen experts, not normalised, or their
    softmax scores, normalised. "x m" multiplies them by m, the number of experts made from one standard FFN.
    """

    dense: ModelConfig
    train: TrainConfig
    corpus: CorpusConfig
    vocab_size: int
    balance: float  # weight of the expert-level loss, DeepSeekMoE Eq 12
    gates: Mapping[str, str] = field(default_factory=dict)  # by family
    lr: Mapping[str, float] = field(default_factory=dict)  # by family; others have that of `train`
    device: str = "cpu"

    def __post_init__(self) -> None:
        for family in (*self.gates, *self.lr):
            require_choice("family", family, tuple(dict.fromkeys(FAMILIES.values())))
        for gates in self.gates.values():
            require_choice("gates", gates, GATES)

    def job(self, name: str) -> Job:
        """Return the run of one of MODELS."""
        require_choice("model", name, MODELS)
        family = FAMILIES[name]
        return self.job_of(name, self.gates.get(family, "printed"), self.lr.get(family, self.train.lr))

    def job_of(self, name: str, gates: str, lr: float) -> Job:
        """Return the run of one of MODELS with these gates and this learning rate."""
        model = self.shrink(MODELS[name], gates)
        balance = {"expert": self.balance} if model.moe and model.moe.scoring_func != "hash" else {}
        train = replace(self.train, balance=balance, lr=lr)
        return Job(model=model, train=train, corpus=self.corpus, vocab_size=self.vocab_size, device=self.device)

    def jobs(self) -> dict[str, Job]:
        """Return the runs of all MODELS, with the evaluations of Figures 4 and 5.

        Raises InputError if a model's size differs from UNITS: this tier's widths cannot be divided as in the paper.
        """
        jobs = {name: self.job(name) for name in MODELS}
        unit = parameters(self.dense).ffn.total
        for name, (total, active) in UNITS.items():
            ffn = parameters(jobs[name].model).ffn
            remedy = f"{name} needs {total * unit} and {active * unit}; choose a dense.ffn_width divisible by 4"
            require((ffn.total, ffn.active) == (total * unit, active * unit), "expert parameters", ffn, remedy)
        return jobs | {
            "gshard-x1.5": replace(jobs["gshard-x1.5"], masked=MASKED),
            "gshard": replace(jobs["gshard"], masked=MASKED),
            "deepseekmoe": replace(jobs["deepseekmoe"], masked=MASKED, active=ACTIVE),
        }

    def shrink(self, model: ModelConfig, gates: str = "printed") -> ModelConfig:
        """Return a model of the paper with this tier's sizes and these gates."""
        moe = model.moe and replace(model.moe, expert_width=self._scaled(model.moe.expert_width))
        if moe and gates != "printed":
            normalised = gates.startswith("normalised")
            scores = "softmax" if normalised else gates.removesuffix(" x m")
            m = max(1, round(self.dense.ffn_width / moe.expert_width)) if gates.endswith(" x m") else 1
            moe = replace(moe, scoring_func=scores, norm_topk_prob=normalised, routed_scaling_factor=float(m))
        return replace(self.dense, ffn_width=self._scaled(model.ffn_width), moe=moe)

    def _scaled(self, printed: int) -> int:
        return round(printed * self.dense.ffn_width / STANDARD)


def world(n_entities: int, n_relations: int, n_names: int = 32) -> WorldConfig:
    """A world whose relations share eight lists of 32 values: every word is one token, and no text is seen twice."""
    return WorldConfig(
        n_first=n_names,
        n_last=n_names,
        n_entities=n_entities,
        n_control=32,
        n_relations=n_relations,
        n_value_lists=8,
        n_documents=20_000_000,
        shares=(0.9, 0.0, 0.03, 0.03, 0.04),
    )


# The outcome of the pilot, notebooks/07_protocol.md.
CPU = Tier(
    ModelConfig(
        vocab_size=1024,
        d_model=32,
        n_layers=2,
        attention=AttentionConfig(n_heads=4, head_dim=8),
        ffn_width=32,
        max_seq_len=256,
    ),
    TrainConfig(steps=1200, batch_size=32, seq_len=64, lr=0.02, routing_every=100),
    CorpusConfig(world=world(512, 8)),
    1024,
    balance=0.001,
    gates={"deepseekmoe": "softmax x m"},
    lr={"hash": 0.04},
)

# Sixteen times the facts, the expert weights and the tokens. Nothing was tuned at this size: learning rates are those
# of the CPU tier over the ratio of the widths, as muP scales those of matrices under AdamW (arXiv:2203.03466).
GPU = Tier(
    ModelConfig(
        vocab_size=1024,
        d_model=128,
        n_layers=2,
        attention=AttentionConfig(n_heads=4, head_dim=32),
        ffn_width=128,
        max_seq_len=256,
    ),
    TrainConfig(steps=2400, batch_size=128, seq_len=128, lr=CPU.train.lr / 4, routing_every=100),
    CorpusConfig(world=world(8192, 8, n_names=128)),
    1024,
    balance=CPU.balance,
    gates=CPU.gates,
    lr={family: lr / 4 for family, lr in CPU.lr.items()},
    device="cuda",
)


def _figure_4(name: str, gates: str) -> Job:
    """A run of the CPU tier with each token's best routed experts masked, and silenced with none in their place."""
    job = CPU.job_of(name, gates, CPU.train.lr)
    assert job.model.moe is not None
    K, E = job.model.moe.top_k, job.model.moe.n_routed_experts
    one = () if E == 16 else (1 / E,)  # a sixteenth of 16 experts is one
    return replace(job, masked=(*one, *MASKED), silenced=tuple(range(1, K + 1)))


# Outside the protocol. GShard's gates are divided by their sum, and "softmax" are not; those of DeepSeekMoE are as
# printed, or times m as in the protocol.
FIGURE_4 = {
    "gshard": _figure_4("gshard", "printed"),
    "gshard-softmax": _figure_4("gshard", "softmax"),
    "gshard-x1.5": _figure_4("gshard-x1.5", "printed"),
    "gshard-x1.5-softmax": _figure_4("gshard-x1.5", "softmax"),
    "deepseekmoe": _figure_4("deepseekmoe", "softmax x m"),
    "deepseekmoe-printed": _figure_4("deepseekmoe", "printed"),
}
