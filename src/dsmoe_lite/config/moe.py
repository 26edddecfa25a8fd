"""The config of a mixture-of-experts layer. Every design of the papers is a set of values."""

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any

from dsmoe_lite.common.errors import require, require_bool, require_choice, require_int, require_number
from dsmoe_lite.config.plain import make_plain

SCORING_FUNCS = ("softmax", "sigmoid", "sqrtsoftplus", "hash")
CHOOSERS = ("token", "expert", "hash")
GROUP_SCORES = ("max", "top2")
SECOND_CHOICES = ("all", "random")
BACKENDS = ("loop", "padded", "grouped", "triton", "cuda", "auto")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One mixture-of-experts layer. The designs of the papers are these settings:

    - Shazeer 2017: `noisy_gating=True, norm_topk_prob=True`.
    - GShard: `top_k=2, norm_topk_prob=True, second_choice="random"` and a capacity. Switch: `top_k=1` and a capacity.
    - Hash Layer: `scoring_func="hash", top_k=1`. Expert choice: `chooser="expert"`.
    - Mixtral, DBRX: `norm_topk_prob=True`. A softmax over the K chosen logits equals the softmax over all E logits,
      divided by its sum over the chosen ones.
    - DeepSeekMoE: many narrow experts, and `n_shared_experts` that every token visits; gates are not normalised.
    - DeepSeek-V2: also `n_group`, `topk_group` (devices), `routed_scaling_factor`, `group_capacity_factor`.
    - DeepSeek-V3: `scoring_func="sigmoid", expert_bias=True, norm_topk_prob=True, group_score="top2"`.
    - DeepSeek-V4: `scoring_func="sqrtsoftplus", expert_bias=True, norm_topk_prob=True, swiglu_limit=10.0`, no groups;
      `chooser="hash"` in the first three layers (`ModelConfig.n_hash_layers`).
    """

    n_routed_experts: int  # E
    top_k: int  # K; with chooser = "expert", the mean number of experts per token
    expert_width: int  # F, hidden width of one routed expert
    n_shared_experts: int = 0  # each of width F and with gate 1
    scoring_func: str = "softmax"  # "hash": a fixed table chooses one expert per token id, with gate 1
    chooser: str = "token"  # "expert": every expert takes the T * K / E tokens with the highest scores
    # "hash": a fixed table chooses K experts per token id; their scores are the gates
    noisy_gating: bool = False  # in training, add noise of a learnt size to the logits
    expert_bias: bool = False  # add a bias to the scores that choose experts, not to the gates
    n_group: int = 1  # G, groups of E / G neighbouring experts: devices in V2, nodes in V3
    topk_group: int = 1  # M, groups a token may reach
    group_score: str = "max"  # of a group: its highest score (V2) or "top2", the sum of its highest two (V3)
    norm_topk_prob: bool = False  # divide the gates by their sum over the K chosen experts
    routed_scaling_factor: float = 1.0  # multiplies the gates of routed experts
    scale_normalised: bool = True  # as V3; False as V2's published code, which does not scale normalised gates
    second_choice: str = "all"  # "random": in training, keep the second with probability min(1, 2 * its share)
    capacity_factor: float | None = None  # an expert's slots over its fair share T * K / E; None: drop no token
    eval_capacity_factor: float | None = None  # the same outside training
    group_capacity_factor: float | None = None  # in training, a group's slots over its fair share T * K / n_group
    never_drop_share: float = 0.1  # share of a batch's sequences, rounded, that a full group does not drop
    swiglu_limit: float | None = None  # experts clamp W_gate x to at most this, W_up x to at most this in size
    routing_groups: int = 1  # equal parts of a batch, each with separate slots: GShard's groups
    backend: str = "auto"

    def __post_init__(self) -> None:
        make_plain(self)
        E, K = self.n_routed_experts, self.top_k
        for name in ("n_routed_experts", "top_k", "expert_width", "n_group", "topk_group", "routing_groups"):
            require_int(name, getattr(self, name), 1)
        require_int("n_shared_experts", self.n_shared_experts, 0)
        for name in ("noisy_gating", "expert_bias", "norm_topk_prob", "scale_normalised"):
            require_bool(name, getattr(self, name))
        require(K <= E, "top_k", K, f"must be at most n_routed_experts = {E}")
        require_choice("scoring_func", self.scoring_func, SCORING_FUNCS)
        require_choice("chooser", self.chooser, CHOOSERS)
        require_choice("group_score", self.group_score, GROUP_SCORES)
        require_choice("second_choice", self.second_choice, SECOND_CHOICES)
        require_choice("backend", self.backend, BACKENDS)
        require_number("routed_scaling_factor", self.routed_scaling_factor, 0.0, open_low=True)
        require_number("never_drop_share", self.never_drop_share, 0.0, 1.0)
        for name in ("capacity_factor", "eval_capacity_factor", "group_capacity_factor", "swiglu_limit"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0.0, open_low=True)
        plain = self.swiglu_limit is None or self.backend not in ("triton", "cuda")
        remedy = "must be 'auto', 'grouped', 'padded' or 'loop': the hand-written kernels have no swiglu_limit"
        require(plain, "backend", self.backend, remedy)
        self._check_groups()
        self._check_choice()
        needed = self.routing_groups == 1 or self.competes
        remedy = "must be 1 if tokens do not compete for slots: set a capacity or chooser = 'expert'"
        require(needed, "routing_groups", self.routing_groups, remedy)

    @property
    def competes(self) -> bool:
        """Whether tokens compete for slots: which tokens an expert takes depends on the rest of the batch."""
        factors = (self.capacity_factor, self.eval_capacity_factor, self.group_capacity_factor)
        return self.chooser == "expert" or any(factor is not None for factor in factors)

    @property
    def routes_alone(self) -> bool:
        """Whether, outside training, a token's experts depend on that token alone, not on its batch."""
        return self.chooser != "expert" and self.eval_capacity_factor is None

    def for_hash_layer(self) -> "MoEConfig":
        """The same layer if a table chooses the experts instead of their scores."""
        changes: dict[str, Any] = {"n_group": 1, "topk_group": 1, "group_score": "max", "group_capacity_factor": None}
        return replace(self, chooser="hash", expert_bias=False, second_choice="all", **changes)

    def _check_groups(self) -> None:
        E, G, M = self.n_routed_experts, self.n_group, self.topk_group
        require(E % G == 0, "n_group", G, f"must divide n_routed_experts = {E}")
        require(M <= G, "topk_group", M, f"must be at most n_group = {G}")
        reachable = M * (E // G)
        remedy = f"must be at most {reachable}: topk_group = {M} groups hold {reachable} experts"
        require(self.top_k <= reachable, "top_k", self.top_k, remedy)
        two = self.group_score != "top2" or E // G >= 2
        require(two, "group_score", self.group_score, f"needs two experts per group; n_group = {G} leaves one")

    def _check_choice(self) -> None:
        K = self.top_k
        remedy = "must be False with top_k = 1: the gate would be the constant 1 and the router would get no gradient"
        require(not (self.norm_topk_prob and K == 1), "norm_topk_prob", self.norm_topk_prob, remedy)
        if self.scoring_func == "hash":
            remedy = "must be 1 with scoring_func = 'hash': the table names one expert per token id"
            require(K == 1, "top_k", K, remedy)
            self._require_defaults(
                ("chooser", "noisy_gating", "expert_bias", "n_group"),
                "scoring_func = 'hash': the table alone chooses",
            )
        if self.chooser == "hash":
            self._require_defaults(
                ("noisy_gating", "expert_bias", "n_group", "second_choice"),
                "chooser = 'hash': the table alone chooses",
            )
        if self.chooser == "expert":
            self._require_defaults(
                (
                    "noisy_gating",
                    "expert_bias",
                    "n_group",
                    "norm_topk_prob",
                    "second_choice",
                    "capacity_factor",
                    "eval_capacity_factor",
                    "group_capacity_factor",
                ),
                "chooser = 'expert': every expert fills its slots exactly",
            )
        remedy = "needs top_k = 2 and norm_topk_prob = True, the only case GShard defines"
        defined = K == 2 and self.norm_topk_prob
        require(self.second_choice == "all" or defined, "second_choice", self.second_choice, remedy)
        grouped = self.group_capacity_factor is None or self.n_group > 1
        require(grouped, "group_capacity_factor", self.group_capacity_factor, "needs n_group of at least 2")

    def _require_defaults(self, names: Collection[str], reason: str) -> None:
        """Require the default value of each field in `names`."""
        for field in fields(self):
            if field.name in names:
                value = getattr(self, field.name)
                require(value == field.default, field.name, value, f"must be {field.default!r} with {reason}")
