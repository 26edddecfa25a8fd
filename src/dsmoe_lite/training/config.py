"""The training config: a frozen dataclass that refuses values that cannot work when it is created."""

from dataclasses import dataclass, field

from dsmoe_lite.common.errors import require, require_bool, require_choice, require_int, require_number, require_type
from dsmoe_lite.config import MoEConfig, make_plain
from dsmoe_lite.layers.quant import Recipe
from dsmoe_lite.training.objective import BALANCE_LOSSES, DEVICE_LOSSES, GLOBAL_LOSSES


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. A step trains on batch_size * grad_accum sequences of seq_len tokens."""

    steps: int  # updates of the weights
    batch_size: int = 16  # sequences per micro-batch
    seq_len: int = 64  # tokens per sequence
    grad_accum: int = 1  # micro-batches per step
    lr: float = 3e-3  # the highest learning rate
    warmup_steps: int = 50  # in which the learning rate rises from 0
    final_lr_share: float = 0.1  # of lr, at the end of the cosine decay
    weight_decay: float = 0.1  # on matrices, but not on norms or routers
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient
    balance: dict[str, float] = field(default_factory=lambda: {"switch": 0.01})  # name -> alpha, for every MoE layer
    global_batch: bool = False  # expert and device losses count the choices of all micro-batches of a step so far
    bias_speed: float = 0.0  # gamma of loss-free balancing: how far expert_bias moves per step
    bias_kappa: float = 0.0  # slope of a bounded step of the bias (arXiv:2602.17004); 0: a step is +1 or -1 times gamma
    mtp_weight: float = 0.3  # lambda, of the loss of multi-token prediction
    mtp_final_weight: float = 0.1  # lambda after mtp_share of the steps
    mtp_share: float = 10 / 14.8  # DeepSeek-V3: 10 of its 14.8 trillion tokens
    precision: str = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU; fp8: layers.quant's
    fp8_block: int = 128  # channels of a token, and side of a square of a weight, that share a scale
    checkpoint_every: int = 0  # steps; 0: only if the run ends or is interrupted
    routing_every: int = 20  # steps between two records of balance figures
    seed: int = 0  # of the weights, and of what is drawn in training

    def __post_init__(self) -> None:
        make_plain(self)
        require_type("balance", self.balance, dict)
        for name in ("steps", "batch_size", "seq_len", "grad_accum", "routing_every"):
            require_int(name, getattr(self, name), 1)
        for name in ("warmup_steps", "checkpoint_every", "seed"):
            require_int(name, getattr(self, name), 0, 2**31 - 1)
        for name in ("lr", "grad_clip"):
            require_number(name, getattr(self, name), 0.0, open_low=True)
        for name in ("weight_decay", "bias_speed", "bias_kappa", "mtp_weight", "mtp_final_weight"):
            require_number(name, getattr(self, name), 0.0)
        for name in ("final_lr_share", "mtp_share"):
            require_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("beta1", "beta2"):
            require_number(name, getattr(self, name), 0.0, 1.0, open_high=True)
        for name, weight in self.balance.items():
            require_choice("balance", name, BALANCE_LOSSES)
            require_number(f"balance weight of {name}", weight, 0.0)
        needs_speed = "needs a bias_speed above 0"
        require(self.bias_speed > 0 or not self.bias_kappa, "bias_kappa", self.bias_kappa, needs_speed)
        require_bool("global_batch", self.global_batch)
        counting = [name for name in GLOBAL_LOSSES if self.balance.get(name)]
        remedy = f"needs a balance weight of {' or '.join(GLOBAL_LOSSES)}"
        require(not self.global_batch or bool(counting), "global_batch", self.global_batch, remedy)
        require_choice("precision", self.precision, ("auto", "fp32", "bf16", "fp8"))
        require_int("fp8_block", self.fp8_block, 1)

    @property
    def fp8_recipe(self) -> Recipe:
        """Blocks as in DeepSeek-V3, with sides of fp8_block."""
        return Recipe(activation=(1, self.fp8_block), weight=(self.fp8_block, self.fp8_block))

    def mtp_weight_at(self, step: int) -> float:
        """lambda of `step`, from 0."""
        return self.mtp_weight if step < self.mtp_share * self.steps else self.mtp_final_weight

    def check_fits(self, moe: MoEConfig | None) -> None:
        """Raise InputError if a model lacks what a loss or the bias needs. A dense model ignores the other losses."""
        has_devices = moe is not None and moe.n_group > 1
        top_logits_win = moe is not None and moe.noisy_gating and not moe.expert_bias and moe.topk_group == moe.n_group
        needs = {
            **dict.fromkeys(DEVICE_LOSSES, (has_devices, "needs a model with n_group > 1")),
            "load": (  # defined only if the K largest noisy logits win
                top_logits_win,
                "needs a model with noisy_gating, without expert_bias, and topk_group = n_group",
            ),
            "sequence": (moe is None or moe.chooser != "expert", "is not defined for a model with chooser = 'expert'"),
        }
        for name, (fits, remedy) in needs.items():
            weight = self.balance.get(name, 0.0)
            require(fits or not weight, f"balance weight of {name}", weight, remedy)
        has_bias = moe is not None and moe.expert_bias
        require(has_bias or not self.bias_speed, "bias_speed", self.bias_speed, "needs a model with expert_bias")
