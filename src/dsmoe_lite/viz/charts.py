"""Every chart of the course by name: a function from plain rows to an Altair chart with a title and a description."""

from dsmoe_lite.viz.ablation_matrix import ablation_matrix
from dsmoe_lite.viz.balance import loss_table, reach_curve
from dsmoe_lite.viz.bias_speed import bias_speed
from dsmoe_lite.viz.bias_step import bias_step
from dsmoe_lite.viz.coactivation import coactivation
from dsmoe_lite.viz.comparison import model_comparison, parameter_split
from dsmoe_lite.viz.curves import capacity_curve, training_curves
from dsmoe_lite.viz.effect_matrix import effect_matrix
from dsmoe_lite.viz.effects_by_kind import effects_by_kind
from dsmoe_lite.viz.expert_capacity import expert_capacity
from dsmoe_lite.viz.expert_load import expert_load
from dsmoe_lite.viz.expert_mix import expert_mix
from dsmoe_lite.viz.expert_worth import expert_worth
from dsmoe_lite.viz.finer_experts import finer_experts
from dsmoe_lite.viz.fp8_error import fp8_error
from dsmoe_lite.viz.influence import influence
from dsmoe_lite.viz.kernels import bank_groups, launch_counts, product_speed
from dsmoe_lite.viz.kv_cache import cache_by_design, cache_calculator, decode_cost
from dsmoe_lite.viz.long_context import needle, rotary_frequencies
from dsmoe_lite.viz.many_devices import exchange_matrix, link_timeline, scaling_curve
from dsmoe_lite.viz.reach_by_chance import reach_by_chance
from dsmoe_lite.viz.roofline import roofline
from dsmoe_lite.viz.router_choice import router_choice
from dsmoe_lite.viz.specialization import specialization_against_null
from dsmoe_lite.viz.token_routing import token_routing
from dsmoe_lite.viz.trend_intervals import trend_intervals

__all__ = [
    "ablation_matrix",
    "bank_groups",
    "bias_speed",
    "bias_step",
    "cache_by_design",
    "cache_calculator",
    "capacity_curve",
    "coactivation",
    "decode_cost",
    "effect_matrix",
    "effects_by_kind",
    "exchange_matrix",
    "expert_capacity",
    "expert_load",
    "expert_mix",
    "expert_worth",
    "finer_experts",
    "fp8_error",
    "influence",
    "launch_counts",
    "link_timeline",
    "loss_table",
    "model_comparison",
    "needle",
    "parameter_split",
    "product_speed",
    "reach_by_chance",
    "reach_curve",
    "roofline",
    "rotary_frequencies",
    "router_choice",
    "scaling_curve",
    "specialization_against_null",
    "token_routing",
    "training_curves",
    "trend_intervals",
]
