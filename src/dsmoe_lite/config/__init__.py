"""Model configs: frozen, keyword-only dataclasses that refuse values that cannot work when they are created.

The letters of all shapes and formulas; each has one meaning in the whole course:

    B  batch: sequences in a batch
    S  sequence: tokens in a sequence
    T  tokens in a batch, B * S
    V  vocabulary: token ids
    D  model width
    L  layers
    H  attention heads
    d  channels of a head
    H_kv  heads of keys and values: H in MHA, fewer in GQA, 1 in MQA
    S_kv  keys that attention reads: cached tokens and the S new ones
    W  sliding window: the tokens a token sees, itself included
    E  routed experts in a layer
    K  top-k: routed experts chosen per token
    F  expert width: hidden channels of a routed expert
    N  rows: choices (token, expert) that are kept, at most T * K
    C  capacity: the most rows an expert takes
    m  segmentation: fine-grained experts made from one ordinary expert
    G  devices, each with a group of E / G experts: n_group
    M  device limit: devices that a token may reach, topk_group
    P  processes that train one model
    alpha  weight of a balance loss
    gamma  bias speed: how far loss-free balancing moves a bias per step
    lambda  weight of the loss of multi-token prediction (MTP)

Letters of a single paper, such as those of MLA and YaRN, are introduced in the module that uses them.
"""

from dsmoe_lite.config.attention import AnyAttention, AttentionConfig, MLAConfig, YarnConfig
from dsmoe_lite.config.model import ModelConfig
from dsmoe_lite.config.moe import BACKENDS, SCORING_FUNCS, MoEConfig
from dsmoe_lite.config.parse import from_dict
from dsmoe_lite.config.plain import make_plain, to_dict

__all__ = [
    "BACKENDS",
    "SCORING_FUNCS",
    "AnyAttention",
    "AttentionConfig",
    "MLAConfig",
    "MoEConfig",
    "ModelConfig",
    "YarnConfig",
    "from_dict",
    "make_plain",
    "to_dict",
]
