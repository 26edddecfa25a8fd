"""AdamW, and its learning rate: a warm-up and a cosine decay."""

import math

import torch

from dsmoe_lite.model import Transformer
from dsmoe_lite.training.config import TrainConfig


def make_optimizer(model: Transformer, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on all matrices but those of routers."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and ".router." not in name]
    undecayed = [p for name, p in model.named_parameters() if p.ndim < 2 or ".router." in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of `step` (from 0): a linear warm-up, then a cosine decay to final_lr_share * lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
