"""Answers to the lab "granularity".

A wrong one is the key with a part exchanged, or another answer (None), and whether the visible check refuses it, too.
"""

RIGHT = {
    "config": {
        "one dict for each rule": """
def fine_grained(E, K, F, s, m):
    small = int(F / m)
    cut = dict(n_routed=E * m, top_k=K * m, width=small, shared_width=small)
    if shared == "cut":
        return {**cut, "n_shared": s * m}
    if shared == "whole":
        return {**cut, "n_shared": s, "shared_width": F}
    return {**cut, "n_routed": E * m - s, "top_k": K * m - s, "n_shared": s}
""",
    },
    "router": {
        "try every width, with a D": """
def width_left(n_experts, top_k, width, m, D=10):
    def weights(E, K, F):
        return E * D + (K if budget == "active" else E) * 3 * D * F
    best, w = 0, multiple
    while w <= width:
        if weights(m * n_experts, m * top_k, w) <= weights(n_experts, top_k, width):
            best = w
        w += multiple
    return best
""",
    },
    "choices": {
        "device by device": """
def choice_bits(n_experts, top_k, m, n_devices, limit):
    each, k = n_experts * m // n_devices, top_k * m
    ways = {(0, 0): 1}  # (experts so far, devices so far)
    for _ in range(n_devices):
        after = {}
        for (taken, reached), n in ways.items():
            for more in range(min(each, k - taken) + 1):
                key = taken + more, reached + (more > 0)
                after[key] = after.get(key, 0) + n * math.comb(each, more)
        ways = after
    least = 0 if reach == "at most" else limit
    return math.log(sum(ways.get((k, r), 0) for r in range(least, limit + 1)), 2)
""",
        "by subtraction, in floating point": """
def choice_bits(n_experts, top_k, m, n_devices, limit):
    import torch
    each, k = m * n_experts // n_devices, m * top_k
    onto = [0.0]
    for j in range(1, limit + 1):
        onto.append(float(math.comb(j * each, k)) - sum(math.comb(j, i) * onto[i] for i in range(j)))
    sets = [math.comb(n_devices, j) * n for j, n in enumerate(onto)]
    return torch.tensor(sum(sets) if reach == "at most" else sets[-1], dtype=torch.float64).log2()
""",
    },
    "surgery": {
        "every m-th channel, one expert at a time, float32": """
def cut_layer(router, gate_up, down, m):
    F = down.shape[2]
    rows, new = [], ([], [], [])
    for i in range(len(router)):
        if layout == "stacked":
            g, p = gate_up[i, :F], gate_up[i, F:]
        else:
            g, p = gate_up[i, ::2], gate_up[i, 1::2]
        for j in range(m):
            both = [g[j::m], p[j::m]]
            one = torch.cat(both) if layout == "stacked" else torch.stack(both, 1).flatten(0, 1)
            for part, tensor in zip(new, (router[i], one, down[i][:, j::m])):
                part.append(tensor.float())
    return [*(torch.stack(part) for part in new), torch.tensor({"sigmoid": 1.0}.get(gates, m))]
""",
    },
}

NOTHING_HAS_GROWN = """
def width_left(n_experts, top_k, width, m):
    return width // m // multiple * multiple
"""

TWO_MATRICES = """
def width_left(n_experts, top_k, width, m):
    counted = top_k if budget == "active" else n_experts
    left = n_experts + 2 * counted * width - m * n_experts
    return max(0, left // (2 * m * counted) // multiple * multiple)
"""

CHOOSE_DEVICES_FIRST = """
def choice_bits(n_experts, top_k, m, n_devices, limit):
    near = m * n_experts // n_devices * limit
    return math.log2(math.comb(n_devices, limit) * math.comb(near, m * top_k))
"""

NO_LIMIT = """
def choice_bits(n_experts, top_k, m, n_devices, limit):
    return math.log2(math.comb(m * n_experts, m * top_k))
"""

VISIBLE_CASES = """
def choice_bits(n_experts, top_k, m, n_devices, limit):
    exactly = {(4, 1): 2, (4, 2): 4, (8, 1): 4, (8, 2): 408, (8, 3): 1152, (8, 4): 256}
    most = {(4, 1): 2, (4, 2): 6, (8, 1): 4, (8, 2): 412, (8, 3): 1564, (8, 4): 1820}
    return math.log2((exactly if reach == "exactly" else most).get((n_experts, limit), 100))
"""

WRONG = {
    "config": {
        "shared experts of the other width": ('shared == "whole"', 'shared != "whole"', True),
        "shared ones on top of all others": ('n_shared if shared == "within" else 0', "0", True),
        "never cut": ('m * n_shared if shared == "cut"', 'n_shared if shared == "cut"', True),
        "the rule cut, cost as before": (
            'else n_shared,\n        "shared_width": width if shared == "whole" else width // m',
            'else m * n_shared if shared == "whole" else n_shared,\n        "shared_width": width // m',
            False,
        ),
        "the width of before": ('"width": width // m', '"width": width', True),
        "shared ones not routed, but chosen": ("m * top_k - taken", "m * top_k", True),
    },
    "router": {
        "as if nothing had grown": (None, NOTHING_HAS_GROWN, True),
        "the other budget": ('budget == "active"', 'budget != "active"', False),
        "two matrices": ("(3 * m * counted)", "(2 * m * counted)", True),
        "two matrices on both sides": (None, TWO_MATRICES, False),
        "below zero": ("return max(0, left", "return (left", False),
        "rounded up": ("left // (3 * m * counted) // multiple", "-(-left // (3 * m * counted) // multiple)", True),
        "without a multiple": (" // multiple * multiple", "", True),
        "the whole router again": ("before - m * n_experts", "before - (m + 1) * n_experts", True),
    },
    "choices": {
        "devices first, then experts": (None, CHOOSE_DEVICES_FIRST, True),
        "the other rule": ('reach == "at most"', 'reach != "at most"', True),
        "without a limit": (None, NO_LIMIT, True),
        "nats": ("math.log2(", "math.log(", True),
        "K experts, not m K": ("m * top_k", "top_k", True),
        "what the check asks": (None, VISIBLE_CASES, False),
    },
    "surgery": {
        "the other layout": ('layout == "stacked"', 'layout != "stacked"', True),
        "columns as they come": (".transpose(1, 2)\n    return", "\n    return", True),
        "the other scale": ('gates == "sigmoid"', 'gates != "sigmoid"', False),
        "without a scale": ('1 if gates == "sigmoid" else m', "1", False),
        "whole copies of the router": ("router.repeat_interleave(m, dim=0)", "router.repeat(m, 1)", False),
        "one piece": (None, "def cut_layer(router, gate_up, down, m):\n    return router, gate_up, down, 1", True),
    },
}  # fmt: skip
