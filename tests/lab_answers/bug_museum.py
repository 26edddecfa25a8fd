"""Answers to the lab "bug_museum".

A wrong one is the key with a part exchanged, or another answer (None), and whether the visible check refuses it, too.
The buggy stub of each question is one of them.
"""

from dsmoe_lite.teaching.lab import find_lab, read_lab

BUG = "the bug itself"
STUBS = {name: question.cells["answer"] for name, question in read_lab(find_lab("bug_museum")).questions.items()}

RIGHT = {
    "padding": {
        "a weight for each token": """
def padded_loss(scores, topk_ids, is_padding):
    real = (~is_padding).double()
    E, K = scores.shape[1], topk_ids.shape[1]
    hot = torch.nn.functional.one_hot(topk_ids, E).sum(1).double()
    f = E / K * (real @ hot) / real.sum()
    return ((f * (real @ scores.double())).sum() / real.sum()).item()
""",
        "a loop": """
def padded_loss(scores, topk_ids, is_padding):
    T, E, f, P = 0, scores.shape[1], [0] * scores.shape[1], [0] * scores.shape[1]
    for s, ids, out in zip(scores.tolist(), topk_ids.tolist(), is_padding.tolist()):
        if out:
            continue
        T += 1
        P = [a + b for a, b in zip(P, s)]
        for i in ids:
            f[i] += 1
    return E / topk_ids.shape[1] * sum(a * b for a, b in zip(f, P)) / T ** 2
""",
    },
    "layers": {
        "stacked": """
def model_loss(layers, top_k):
    scores = torch.stack(layers).double().softmax(-1)
    hot = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)
    return scores.shape[-1] * (hot.mean(1) * scores.mean(1)).sum(-1).mean()
""",
    },
    "softmax_twice": {
        "logits are logits": """
def gates_and_loss(x, weight, top_k):
    logits = torch.nn.functional.linear(x, weight)
    p = logits.softmax(-1)
    best = p.topk(top_k)
    hot = torch.zeros_like(p).scatter(1, best.indices, 1.0)
    return best.values, torch.dot(hot.mean(0), p.mean(0)) * p.shape[1] / top_k
""",
    },
    "switch": {
        "another threshold": STUBS["switch"].replace("> 1", ">= 1"),
    },
    "groups": {
        "group by group": """
def choose(biased, n_group, topk_group, top_k):
    size, chosen = biased.shape[1] // n_group, []
    for row in biased.tolist():
        worth = [sum(sorted(row[g * size:(g + 1) * size])[-2:]) for g in range(n_group)]
        open_groups = sorted(range(n_group), key=lambda g: -worth[g])[:topk_group]
        reach = [e for e in range(len(row)) if e // size in open_groups]
        chosen.append(sorted(reach, key=lambda e: -row[e])[:top_k])
    return torch.tensor(chosen)
""",
        "the smallest number": STUBS["groups"].replace("0.0", "torch.finfo(biased.dtype).min"),
    },
    "bias": {
        "the bias taken off again": """
def route(scores, bias, top_k):
    values, ids = (scores.double() + bias).topk(top_k)
    values = values - bias[ids]
    return ids.flip(1), (values / values.sum(1, keepdim=True)).flip(1)
""",
    },
    "softmax_order": {
        "a mask": """
def layer(logits, outputs, top_k):
    p = logits.double().softmax(1)
    kth = p.topk(top_k).values[:, -1:]
    return torch.einsum("te,ted->td", p * (p >= kth), outputs.double())
""",
        "the difference of two logs": """
def layer(logits, outputs, top_k):
    chosen = logits.topk(top_k)
    g = (chosen.values - logits.logsumexp(1, keepdim=True)).exp()
    return sum(g[:, k:k + 1] * outputs[torch.arange(len(g)), chosen.indices[:, k]] for k in range(top_k))
""",
    },
    "norm_and_scale": {
        "one divisor": """
def scaled_gates(scores, topk_ids, normalise, scale):
    g = torch.take_along_dim(scores, topk_ids, 1)
    return scale * g / (g.sum(1, keepdim=True) if normalise else 1)
""",
    },
    "fused_scale": {
        "one path": """
def fused_layer(outputs, gates, scale, scaled_before):
    return outputs[:, -1] + scale * torch.einsum("tk,tkd->td", gates, outputs[:, :-1])
""",
    },
    "fused_lost": {
        "overwritten": """
def fused_route(scores, top_k, n_shared):
    gates, ids = scores.sort(dim=1, descending=True)
    gates, ids = gates[:, :top_k], ids[:, :top_k]
    for n in range(n_shared):
        ids = torch.nn.functional.pad(ids, (0, 1), value=scores.shape[1] + n)
        gates = torch.nn.functional.pad(gates, (0, 1), value=1.0)
    return ids, gates
""",
    },
    "coactivation": {
        "a loop over pairs": """
def coactivation(topk_ids, n_experts):
    both, n = torch.zeros(n_experts, n_experts), [0] * n_experts
    for row in topk_ids.tolist():
        for i in row:
            n[i] += 1
            for j in row:
                both[i, j] += i != j
    return [[float(b) / max(1, n[i]) for b in both[i]] for i in range(n_experts)]
""".replace("return [", "return torch.tensor([").replace("range(n_experts)]\n", "range(n_experts)])\n"),
    },
    "rope": {
        "complex numbers": """
def rotate(x, positions):
    d = x.shape[-1]
    z = torch.view_as_complex(x.double().reshape(len(x), -1, 2).contiguous())
    angle = positions.double()[:, None] / 10000 ** (torch.arange(0, d, 2).double() / d)
    return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(1)
""",
        "in place": """
def rotate(x, positions):
    y, d = x.clone(), x.shape[1]
    for j in range(d // 2):
        phi = positions * 10000.0 ** (-2 * j / d)
        a, b = x[:, 2 * j], x[:, 2 * j + 1]
        y[:, 2 * j], y[:, 2 * j + 1] = a * phi.cos() - b * phi.sin(), b * phi.cos() + a * phi.sin()
    return y
""",
    },
    "yarn": {
        "straight from the release": """
def score_scale(released):
    mu = released["mscale"] if "mscale" in released else 1
    return released["head_dim"] ** -0.5 * (1 + mu * math.log(released["factor"]) / 10) ** 2
""",
        "the whole configuration": STUBS["yarn"].replace(
            'return {"head_dim": released["head_dim"], "factor": released["factor"]}', "return dict(released)"
        ),
    },
    "gradients": {
        "a sum over all processes": """
def mean_gradients(dense, expert, sharing):
    W = len(dense)
    return dense.sum(0) / W, expert.sum(0) / W
""",
    },
    "mtp": {
        "the matrix turned round": """
def mtp_input(states, embeddings, eh_proj):
    D = states.shape[1]
    return states[:-1] @ eh_proj[:, D:].T + embeddings[1:] @ eh_proj[:, :D].T
""",
    },
    "fp8": {
        "repeated and cut": """
def dequantize(q, scale_inv):
    wide = scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return q * wide[: q.shape[0], : q.shape[1]]
""",
        "block by block": """
def dequantize(q, scale_inv):
    out = q.clone().double()
    for a in range(0, q.shape[0], 128):
        for b in range(0, q.shape[1], 128):
            out[a:a + 128, b:b + 128] *= scale_inv[a // 128, b // 128]
    return out
""",
    },
}


def bug_with(name, old, new):
    """The bug of this question with a part exchanged: another bug."""
    assert STUBS[name].count(old) == 1, (name, old)
    return STUBS[name].replace(old, new)


REAL = "scores, topk_ids = scores[~is_padding], topk_ids[~is_padding]"
SHAPE = "    T, K = topk_ids.shape"
PATHS = "1.0 if scaled_before else 1 / scale"
IDS_ALONE = """
def fused_route(scores, top_k, n_shared):
    gates, ids = scores.topk(top_k + n_shared)
    ids[:, top_k:] = scores.shape[1]
    return ids, gates
"""
EQUAL_BLOCKS = """
def dequantize(q, scale_inv):
    high, wide = (-(-size // n) for size, n in zip(q.shape, scale_inv.shape))
    scale = scale_inv.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return q * scale[: q.shape[0], : q.shape[1]]
"""

WRONG = {
    "padding": {
        BUG: (None, STUBS["padding"], True),
        "only the counts": (REAL, "topk_ids = topk_ids[~is_padding]", True),
        "only the scores": (REAL, "scores = scores[~is_padding]", True),
        "divided by all": (f"    {REAL}\n{SHAPE}", f"{SHAPE}\n    {REAL}", True),
        "padding alone": (REAL, REAL.replace("~", ""), True),
    },
    "layers": {
        BUG: (None, STUBS["layers"], True),
        "the sum of layers": (" / len(losses)", "", True),
        "the last layer": ("sum(losses) / len(losses)", "losses[-1]", False),
        "the worst layer": ("sum(losses) / len(losses)", "max(losses)", False),
        "another scale": ("minlength=E) / T", "minlength=E) / (T * top_k)", True),
    },
    "softmax_twice": {
        BUG: (None, STUBS["softmax_twice"], True),
        "gates are logits": (None, bug_with("softmax_twice", "(x @ weight.T).softmax(dim=1)", "x @ weight.T"), False),
        "no softmax at all": ("(x @ weight.T).softmax(dim=1)", "x @ weight.T", False),
        "gates softmaxed twice": ("return gates,", "return gates.softmax(dim=1),", False),
        "gates divided": ("return gates,", "return gates / gates.sum(dim=1, keepdim=True),", False),
    },
    "switch": {
        BUG: (None, STUBS["switch"], True),
        "no z-loss": (" + alpha_z * z", "", False),
        "no balance loss": (" + alpha * balance", "", False),
        "dense models fail": ("    if not routers:\n        return text_loss\n", "", False),
        "a mean over all layers": ("len(routers)\n    z", "len(logits)\n    z", False),
        "the sign": ("+ alpha * balance", "- alpha * balance", False),
    },
    "groups": {
        BUG: (None, STUBS["groups"], True),
        "minus one": ("-torch.inf", "-1.0", False),
        "a smaller zero": ("-torch.inf", "-1e-9", True),
        "no groups": (".masked_fill(closed.unsqueeze(2), -torch.inf)", ".contiguous()", True),
        "the worst groups": ("worth.topk(topk_group, dim=1)", "worth.topk(topk_group, dim=1, largest=False)", True),
        "the best expert of a group": ("grouped.topk(2, dim=2).values.sum(dim=2)", "grouped.amax(dim=2)", True),
    },
    "bias": {
        BUG: (None, STUBS["bias"], True),
        "no bias": ("(scores + bias)", "scores", False),
        "not divided": (" / gates.sum(dim=1, keepdim=True)", "", False),
        "the mean bias taken off": (None, bug_with("bias", "+ bias", "+ bias - bias.mean()"), False),
        "divided by all": ("gates.sum(dim=1", "scores.sum(dim=1", False),
    },
    "softmax_order": {
        BUG: (None, STUBS["softmax_order"], True),
        "divided by the sum": ("    ids =", "    gates = gates / gates.sum(dim=1, keepdim=True)\n    ids =", True),
        "sigmoids": ("softmax(dim=1)", "sigmoid()", False),
        "softmax over tokens": ("softmax(dim=1)", "softmax(dim=0)", False),
        "twice": ("softmax(dim=1)", "softmax(dim=1).softmax(dim=1)", False),
    },
    "norm_and_scale": {
        BUG: (None, STUBS["norm_and_scale"], True),
        "always divided": ("if normalise:", "if True:", True),
        "never divided": ("if normalise:", "if False:", False),
        "never scaled": (" * scale", "", True),
        "scaled, then divided": (None, bug_with("norm_and_scale", "topk_ids)\n", "topk_ids) * scale\n"), True),
        "scaled in V3 only": ("gates * scale", "gates * (scale if normalise else 1)", True),
        "V3's factor": ("gates * scale", "gates * (2.5 if normalise and scale > 1 else scale)", False),
    },
    "fused_scale": {
        BUG: (None, STUBS["fused_scale"], True),
        "1 on both paths": (PATHS, "1.0", True),
        "paths exchanged": (PATHS, "1 / scale if scaled_before else 1.0", True),
        "scaled twice": (None, bug_with("fused_scale", "total if scaled_before else ", ""), False),
        "routed experts unscaled": (PATHS + ")", "1.0)\n    scale = 1.0", False),
    },
    "fused_lost": {
        BUG: (None, STUBS["fused_lost"], True),
        "one shared expert always": ("torch.arange(E, E + n_shared)", "torch.full((n_shared,), E)", False),
        "gates of routed ones": ("torch.ones(T, n_shared)", "scores.topk(top_k + n_shared).values[:, top_k:]", False),
        "the shared ones first": ("(ids, shared)", "(shared, ids)", False),
        "the last routed expert": ("torch.arange(E, E + n_shared)", "torch.arange(E - n_shared, E)", True),
        "ids alone": (None, IDS_ALONE, False),
    },
    "coactivation": {
        BUG: (None, STUBS["coactivation"], True),
        "neighbours in a circle": (None, bug_with("coactivation", "range(1, ", "range("), True),
        "rescaled": (None, bug_with("coactivation", "return both", "return topk_ids.shape[1] / 2 * both"), True),
        "shares of all tokens": ("counts.clamp(min=1).unsqueeze(1)", "len(topk_ids)", True),
        "divided by the other's count": (".unsqueeze(1)", "", True),
        "the diagonal": ("    both.fill_diagonal_(0)\n", "", True),
        "experts without a token": (".clamp(min=1)", "", False),
    },
    "rope": {
        BUG: (None, STUBS["rope"], True),
        "the first channels apart": ("torch.stack(turned, dim=2).flatten(1)", "torch.cat(turned, dim=1)", False),
        "in pairs of halves": ("x[:, ::2], x[:, 1::2]", "x[:, : d // 2], x[:, d // 2 :]", True),
        "the other way": ("angle = positions", "angle = -positions", True),
        "angles of all channels": ("torch.arange(0, d, 2) / d", "torch.arange(0, d // 2) / d", False),
    },
    "yarn": {
        BUG: (None, STUBS["yarn"], True),
        "V2's default": (None, bug_with("yarn", "1.0) *", "0.707) *"), False),
        "required": ('.get("mscale", 1.0)', '["mscale"]', False),
        "not squared": ("t**2", "t", True),
        "zero is none": ('released.get("mscale", 1.0)', '(released.get("mscale") or 1.0)', False),
    },
    "gradients": {
        BUG: (None, STUBS["gradients"], True),
        "no mean over the copies": ("expert.mean(dim=0)", "expert.sum(dim=0)", False),
        "both divided": ("dense.mean(dim=0)", "dense.mean(dim=0) / sharing", True),
        "divided by 4": ("/ sharing", "/ 4", False),
        "divided by all": ("/ sharing", "/ len(dense)", False),
        "twice": ("/ sharing", "/ sharing**2", True),
    },
    "mtp": {
        BUG: (None, STUBS["mtp"], True),
        "its own embedding": ("embeddings[1:]", "embeddings[:-1]", True),
        "no state": ("states[:-1]", "0 * states[:-1]", False),
        "the next state": ("states[:-1]", "states[1:]", False),
        "the last token, too": ("(embeddings[1:], states[:-1])", "(embeddings.roll(-1, 0), states)", True),
    },
    "fp8": {
        BUG: (None, STUBS["fp8"], True),
        "the edge": (None, bug_with("fp8", "q / scale", "q * scale"), False),
        "the name": ("q * scale", "q / scale", True),
        "blocks of equal size": (None, EQUAL_BLOCKS, False),
        "one scale": ("scale_inv[rows][:, columns]", "scale_inv[0, 0]", False),
    },
}  # fmt: skip
