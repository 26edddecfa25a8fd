"""Answers to the lab "balance".

A wrong one is the key with a part exchanged, or another answer (None), and whether the visible check refuses it, too.
"""

RIGHT = {
    "loads": {
        "a loop": """
def loads(topk_ids):
    counts = [0] * n_experts
    for row in topk_ids.tolist():
        for i in row:
            if i != -1:
                counts[i] += 1
    return [c * n_experts / sum(counts) for c in counts]
""",
        "numpy": """
import numpy
def loads(topk_ids):
    ids = topk_ids.numpy().ravel()
    counts = numpy.bincount(ids[ids >= 0], minlength=n_experts)
    return list(counts / counts.mean())
""",
    },
    "loss": {
        "one-hot and autograd": """
def loss_and_gradient(scores, topk_ids):
    s = scores.clone().requires_grad_()
    used = topk_ids if counted == "all" else topk_ids[:, 0]
    hot = torch.nn.functional.one_hot(used, s.shape[1]).float().reshape(-1, s.shape[1])
    loss = s.shape[1] * torch.dot(hot.mean(0), s.mean(0))
    loss.backward()
    return loss.item(), s.grad
""",
    },
    "bias": {
        "where": """
def next_bias(bias, counts):
    mean = counts.sum() / len(counts)
    if rule == "sign":
        return bias + torch.where(counts < mean, gamma, 0.0) - torch.where(counts > mean, gamma, 0.0)
    return torch.tensor([b + max(-gamma, min(gamma, gamma * float(1 - c / mean))) for b, c in zip(bias, counts)])
""",
    },
    "updates": {
        "float32": """
def updates_needed(scores, top_k, limit):
    b, n = torch.zeros(n_experts), 0
    while n < 500:
        chosen = torch.zeros_like(scores).scatter(1, (scores + b).topk(top_k).indices, 1.0).sum(0)
        mean = chosen.mean()
        if chosen.max() / mean <= 1 + limit:
            break
        b = b + gamma * (torch.sign(mean - chosen) if rule == "sign" else ((mean - chosen) / mean).clip(-1, 1))
        n += 1
    return n
""",
    },
}

TABLE = """
def loads(ids):
    return [n_experts / 2] + [n_experts / 6] * 3 + [0.0] * (n_experts - 4)
"""

WRONG = {
    "loads": {
        "shares": ("counts.mean()", "counts.sum()", True),
        "idle experts left out": (", minlength=n_experts", "", True),
        "dropped go to expert 0": ("topk_ids[topk_ids >= 0]", "topk_ids.clamp(min=0).flatten()", False),
        "a memorised table": (None, TABLE, False),
    },
    "loss": {
        "the gradient of a sum": ("f / len(scores)", "f", False),
        "the other choices": ('counted == "all"', 'counted != "all"', False),
        "counts of its own": ("    ids =", "    topk_ids = scores.topk(topk_ids.shape[1]).indices\n    ids =", False),
        "without E": ("f / f.mean()", "f / f.sum()", True),
        "one gradient for all": (", (f / len(scores)).expand_as(scores)", ", f / len(scores)", True),
    },
    "bias": {
        "the wrong way": ("bias + gamma", "bias - gamma", True),
        "the step alone": ("return bias + gamma * step", "return gamma * step", False),
        "the other rule": ('rule == "sign"', 'rule != "sign"', False),
        "unbounded": (".clamp(-1, 1)", "", False),
    },
    "updates": {
        "counts from one": ("return updates", "return updates + 1", True),
        "the best of two for all": ("topk(top_k", "topk(2", False),
        "starts anew each time": ("bias += gamma", "bias = gamma", False),
        "always 100": (None, "def updates_needed(scores, top_k, limit):\n    return 100", True),
    },
}  # fmt: skip
