"""Answers to the lab "expert_ablation".

A wrong one is the key with a part exchanged, or another answer (None), and whether the visible check refuses it, too.
"""

RIGHT = {
    "masked": {
        "-inf and topk": """
def choose_masked(scores, share, top_k):
    E = scores.shape[1]
    n = int(share * E) + (rounded == "up" and share * E > int(share * E))
    rest = scores.scatter(1, scores.topk(n, dim=1).indices, float("-inf"))
    values, ids = rest.topk(top_k, dim=1)
    if gate_norm == "own":
        return ids, values
    used = values if gate_norm == "divided" else scores.topk(top_k, dim=1).values
    return ids, values / used.sum(-1)[:, None]
""",
        "a loop in float64": """
def choose_masked(scores, share, top_k):
    all_ids, all_gates = [], []
    for row in scores.double().tolist():
        order = sorted(range(len(row)), key=lambda i: -row[i])
        n = {"up": math.ceil, "down": math.floor}[rounded](len(row) * share)
        ids = order[n:][:top_k]
        total = {"own": [], "divided": ids, "fixed": order[:top_k]}[gate_norm]
        norm = sum(row[i] for i in total) or 1.0
        all_ids.append(ids)
        all_gates.append([row[i] / norm for i in ids])
    return torch.tensor(all_ids), torch.tensor(all_gates)
""",
    },
    "silenced": {
        "a loop": """
def silenced_output(scores, outputs, silenced, top_k):
    y = torch.zeros(len(scores), outputs.shape[2])
    for t, row in enumerate(scores.tolist()):
        order = sorted(range(len(row)), key=lambda i: row[i], reverse=True)
        left = order if replacement == "nobody" else [i for i in order if i not in silenced]
        used = left[:top_k]
        by = {"own": 1.0, "divided": sum(row[i] for i in used), "fixed": sum(row[i] for i in order[:top_k])}
        for i in used:
            if i not in silenced:
                y[t] += row[i] / by[gate_norm] * outputs[t, i]
    return y
""",
        "scores of 0": """
def silenced_output(scores, outputs, silenced, top_k):
    alive = torch.ones(scores.shape[1])
    for i in silenced:
        alive[i] = 0
    ranked = scores * alive if replacement == "next" else scores
    used = ranked >= ranked.sort(dim=1, descending=True).values[:, top_k - 1 : top_k]
    gates = scores * used
    if gate_norm != "own":
        best = scores.sort(dim=1, descending=True).values[:, :top_k]
        gates = gates / (gates if gate_norm == "divided" else best).sum(1, keepdim=True)
    return ((gates * alive)[:, :, None] * outputs).sum(1)
""",
    },
    "worth": {
        "loops": """
def worth_and_load(intact, without, topk_ids):
    E, ids = len(without), topk_ids.tolist()
    worths, loads = [], []
    for i in range(E):
        users = [t for t, row in enumerate(ids) if i in row]
        over = users if mean_over == "users" else range(len(ids))
        rises = [float(without[i, t]) - float(intact[t]) for t in over]
        worths.append(sum(rises) / len(rises))
        loads.append(len(users))
    a = b = 0
    for i in range(E):
        for j in range(i):
            if (worths[i] - worths[j]) * (loads[i] - loads[j]) > 0:
                a += 1
            else:
                b += 1
    return worths, (a - b) / (a + b)
""",
        "scipy": """
def worth_and_load(intact, without, topk_ids):
    from scipy.stats import kendalltau
    rise = without - intact
    load = torch.bincount(topk_ids.flatten(), minlength=len(rise))
    if mean_over == "all":
        worth = rise.mean(dim=1)
    else:
        worth = torch.stack([rise[i, (topk_ids == i).sum(1) > 0].mean() for i in range(len(rise))])
    return worth.tolist(), kendalltau(load.numpy(), worth.numpy()).statistic
""",
    },
    "control": {
        "a formula and a loop": """
import itertools

def control(contributions, removed):
    T, E, D = contributions.shape
    gram = torch.einsum("tid,tjd->ij", contributions, contributions)  # whole numbers
    keep = [i for i in range(E) if controls == "any" or i not in removed]
    n, m, part = len(removed), len(keep), gram[keep][:, keep]
    alone = part.diagonal().sum()
    pairs = (part.sum() - alone) * (n - 1) / (m - 1)
    mine, hits = gram[removed][:, removed].sum(), 0
    for experts in itertools.combinations(keep, n):
        hits += bool(gram[list(experts)][:, list(experts)].sum() >= mine)
    return float((alone + pairs) * n / m / T), hits / math.comb(m, n)
""",
        "orders counted, too": """
def control(contributions, removed):
    from itertools import permutations
    def damage(which):
        lost = sum(contributions[:, i] for i in which)
        return (lost**2).sum(-1).mean().item()
    E = contributions.shape[1]
    pool = set(range(E)) - (set(removed) if controls == "others" else set())
    found = torch.tensor([damage(sorted(which)) for which in permutations(pool, len(removed))])
    return found.double().mean().item(), (found >= damage(sorted(removed))).double().mean().item()
""",
    },
}

ADDED_UP = """
from itertools import combinations

def control(contributions, removed):
    single = contributions.square().sum(dim=2).mean(dim=0).tolist()
    pool = [i for i in range(len(single)) if controls == "any" or i not in removed]
    found = [sum(single[i] for i in experts) for experts in combinations(pool, len(removed))]
    mine = sum(single[i] for i in removed)
    return sum(found) / len(found), sum(one >= mine for one in found) / len(found)
"""

SAMPLED = """
import random

def control(contributions, removed):
    def damage(experts):
        return float(contributions[:, experts].sum(dim=1).square().sum(dim=1).mean())

    E = contributions.shape[1]
    pool = [i for i in range(E) if controls == "any" or i not in removed]
    found = [damage(random.sample(pool, len(removed))) for _ in range(500)]
    return sum(found) / 500, sum(one >= damage(removed) for one in found) / 500
"""

MEMORISED = """
def worth_and_load(intact, without, topk_ids):
    worths = (without - intact)[:, 0].tolist()
    return worths, 1.0 if worths[0] > 0 else -1.0
"""

WRONG = {
    "masked": {
        "the other rounding": ('rounded == "up"', 'rounded != "up"', False),
        "to the nearest": ('math.ceil(masked) if rounded == "up" else math.floor(masked)', "round(masked)", False),
        "the number of experts of the lab": ("scores.shape[1]", "n_experts", True),
        "divided by all that is left": ("chosen.sum(1, True)", "scores.gather(1, ranked[:, n:]).sum(1, True)", True),
        "fixed by what is used": ('"fixed": best', '"fixed": chosen', True),
        "the worst of the rest": ("n : n + top_k", "-top_k:", True),
        "masked among the K best": ("ids = ranked[:, n : n + top_k]", "ids = ranked[:, :top_k]", True),
    },
    "silenced": {
        "the other replacement": ('replacement == "nobody"', 'replacement != "nobody"', True),
        "gates of the silenced stay": (".masked_fill(off, 0.0)", "", True),
        "scores changed in place": ("remaining = scores.masked_fill", "remaining = scores.masked_fill_", True),
        "divided after silencing": (
            "weights = scores.gather(1, ids)",
            "weights = scores.gather(1, ids) * ~off.gather(1, ids)",
            False,
        ),
        "fixed by what is used": (
            "weights / best.values.sum(dim=1, keepdim=True)",
            "weights / weights.sum(dim=1, keepdim=True)",
            False,
        ),
        "two for all K": ("remaining.topk(top_k)", "remaining.topk(2)", False),
        "only the first of the list": ("off[:, silenced]", "off[:, silenced[:1]]", False),
    },
    "worth": {
        "a fall, not a rise": ("(without - intact)", "(intact - without)", True),
        "rises only": (".double(), len", ".double().clamp(min=0), len", True),
        "the other tokens": ('mean_over == "users"', 'mean_over != "users"', False),
        "users over all tokens": ("/ counted.sum(dim=1)", "/ rises.shape[1]", True),
        "load of the first choice": ("(topk_ids == i).any(dim=1)", "topk_ids[:, 0] == i", False),
        "pairs with themselves": ("(E * (E - 1))", "(E * E)", True),
        "a memorised table": (None, MEMORISED, False),
    },
    "control": {
        "the other sets": ('controls == "others"', 'controls != "others"', False),
        "damages added up": (None, ADDED_UP, True),
        "sampled": (None, SAMPLED, False),
        "strictly larger": (">= damage", "> damage", True),
        "length, not squared": (".sum(dim=1).mean()", ".sum(dim=1).sqrt().mean()", True),
        "sum over the tokens": (".sum(dim=1).mean()", ".sum(dim=1).sum()", False),
        "less harmful ones": (">= damage", "<= damage", True),
        "mean over the numbers, too": ("lost.square().sum(dim=1).mean()", "lost.square().mean()", True),
    },
}  # fmt: skip
