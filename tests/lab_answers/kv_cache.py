"""Answers to the lab "kv_cache".

A wrong one is the key with a part exchanged, or another answer (None), and whether the visible check refuses it, too.
"""

RIGHT = {
    "bytes": {
        "groups of layers": """
def cache_bytes(model, lengths):
    L = model["n_layers"]
    wide = {"odd": L // 2, "sixth": L // 6, "ends": min(L, 2)}[global_layers]
    kept = wide * sum(lengths) + (L - wide) * sum(min(S, model["window"]) for S in lengths)
    width = model["kv_lora_rank"] + model["qk_rope_head_dim"] if "kv_lora_rank" in model else (
        2 * model["n_kv_heads"] * model["head_dim"])
    return kept * width * bits // 8
""",
        "a flag for each layer": """
def cache_bytes(model, lengths):
    S, total = torch.tensor(lengths), 0
    for l in range(model["n_layers"]):
        if global_layers == "odd":
            wide = l % 2 == 1
        elif global_layers == "sixth":
            wide = (l + 1) % 6 == 0
        else:
            wide = l in (0, model["n_layers"] - 1)
        n = (S if wide else S.clamp(max=model["window"])).sum().item()
        if "head_dim" in model:
            total += n * 2 * model["head_dim"] * model["n_kv_heads"]
        else:
            total += n * (model["kv_lora_rank"] + model["qk_rope_head_dim"])
    return total * (bits / 8)
""",
    },
    "fits": {
        "from the longest batch down": """
def admitted(lengths, memory, weights, per_token):
    room = (memory - weights) // (per_token * page)
    for n in range(len(lengths), 0, -1):
        pages = [math.ceil(S / page) for S in lengths[:n]]
        if (sum(pages) if batching == "paged" else n * max(pages)) <= room:
            return n
    return 0
""",
        "running totals": """
def admitted(lengths, memory, weights, per_token):
    count = total = longest = 0
    for S in lengths:
        p = (S + page - 1) // page * page * per_token
        total, longest = total + p, max(longest, p)
        need = total if batching == "paged" else (count + 1) * longest
        if memory < weights + need:
            return count
        count += 1
    return count
""",
    },
    "held": {
        "a dictionary": """
def held(steps):
    inside, length = {}, 0
    for step in steps:
        while step > 0:
            if keep == "chunks" and length % slots == 0:
                inside.clear()
            place = length % slots
            if keep == "sinks" and length >= slots:
                place = n_sinks + (length - slots) % (slots - n_sinks)
            inside[place] = length
            length, step = length + 1, step - 1
        length += step
        inside = {place: t for place, t in inside.items() if t < length}
    return [inside.get(place, -1) for place in range(slots)]
""",
        "a tensor": """
def held(steps):
    c = torch.full((slots,), -1)
    n = 0
    for step in steps:
        for t in range(n, n + step):
            if keep == "chunks" and t % slots == 0:
                c.fill_(-1)
            first = n_sinks if keep == "sinks" else 0
            c[t if t < first else first + (t - first) % (slots - first)] = t
        n += step
        c[c >= n] = -1
    return c.tolist()
""",
    },
    "decode": {
        "a mask, one head at a time, float64": """
def decode(q, q_rope, cache, positions, t, window, W_UK, W_UV):
    j, out = positions, []
    hidden = (j < 0) | (j > t)
    if keep == "window":
        hidden |= j <= t - window
    elif keep == "sinks":
        hidden |= (j >= n_sinks) & (j <= t - window + n_sinks)
    else:
        hidden |= j < t - t % window
    H, d_v, d_c = W_UV.shape
    cache = cache.double()
    for i in range(H):
        look = torch.cat((q[i].double() @ W_UK[i].double(), q_rope[i].double()))
        scores = (cache @ look) / (len(q[i]) + len(q_rope[i])) ** 0.5
        a = scores.masked_fill(hidden, -torch.inf).softmax(0)
        out.append(W_UV[i].double() @ (a @ cache)[:d_c])
    return torch.stack(out)
""",
        "scaled_dot_product_attention": """
def decode(q, q_rope, cache, positions, t, window, W_UK, W_UV):
    ok = (positions >= 0) & (positions <= t)
    if keep == "window":
        ok &= positions > t - window
    if keep == "sinks":
        ok &= (positions < n_sinks) | (positions > t - (window - n_sinks))
    if keep == "chunks":
        ok &= positions // window == t // window
    absorbed = torch.cat(((q[:, None] @ W_UK)[:, 0], q_rope), dim=1)
    scale = (q.shape[1] + q_rope.shape[1]) ** -0.5
    mixed = torch.nn.functional.scaled_dot_product_attention(
        absorbed[None], cache[None], cache[None], attn_mask=ok[None, None], scale=scale)[0]
    return (W_UV @ mixed[:, : W_UK.shape[2], None])[..., 0]
""",
    },
}

FROM_THE_LENGTH = """
def held(steps):
    n, first = sum(steps), n_sinks if keep == "sinks" else 0
    cache = [-1] * slots
    for t in range(n - n % slots if keep == "chunks" else 0, n):
        cache[t if t < first else first + (t - first) % (slots - first)] = t
    return cache
"""

RUN_ON = """    if min(steps) < 0:
        steps = [abs(step) for step in steps]
        gone = set(range(sum(steps))) - set(range(steps[0]))
        return [-1 if t in gone else t for t in held(steps)]
    cache, t ="""

SLIDES = """
def held(steps):
    n = sum(steps)
    last = list(range(max(0, n - slots), n))
    return last + [-1] * (slots - len(last))
"""

WRONG = {
    "bytes": {
        "bits for bytes": ("bits / 8", "bits", True),
        "no values": ("2 * model", "model", True),
        "a latent for every head": (
            'width = model["kv_lora_rank"] +', 'width = model["n_heads"] * model["kv_lora_rank"] +', True
        ),
        "one window for the batch": (
            "for S in lengths:\n            tokens += S", "for S in [sum(lengths)]:\n            tokens += S", True
        ),
        "as long as the longest": ("for S in lengths", "for S in [max(lengths)] * len(lengths)", True),
        "the other layers": ("if layer in everything", "if layer not in everything", False),
        "layers counted from 1": ("for layer in range(L)", "for layer in range(1, L + 1)", False),
        "other global layers": ("[global_layers]", '["sixth"]', False),
    },
    "fits": {
        "one overtakes": (
            "            break\n        n += 1", "            del pages[n]\n        else:\n            n += 1", True
        ),
        "fits only with room to spare": ("per_token > memory", "per_token >= memory", True),
        "broken pages": ("pages = [-(-S // page) for S", "pages = [S / page for S", True),
        "the last page left out": ("-(-S // page)", "S // page", True),
        "the longest of the queue": ("max(batch)", "max(pages)", True),
        "the other server": ('batching == "paged"', 'batching != "paged"', False),
        "no weights": ("weights + taken", "taken", True),
    },
    "held": {
        "from the length alone": (None, FROM_THE_LENGTH, True),
        "a window for all": ('keep == "sinks" and', 'keep == "never" and', False),
        "nothing emptied": ('keep == "chunks" and', 'keep == "never" and', False),
        "sinks move on": ("n_sinks + (t - n_sinks) % (slots - n_sinks)", "n_sinks + t % (slots - n_sinks)", True),
        "dropped, but not emptied": ("                cache[slot(t)] = -1", "                pass", True),
        "positions run on": ("    cache, t =", RUN_ON, True),
        "a list that slides": (None, SLIDES, True),
    },
    "decode": {
        "the wrong root": ("d_h + k_rope.shape[1]", "cache.shape[1]", True),
        "no rotated part": (" + q_rope @ k_rope.T", "", True),
        "later tokens": (" & (positions <= t)", "", True),
        "empty slots": (" & (positions >= 0)", "", True),
        "a window one too long": ("t - positions < window,", "t - positions <= window,", False),
        "as many after the sinks": ("window - n_sinks", "window", False),
        "the last W slots": ("positions // window == t // window", "t - positions < window", False),
        "slots as positions": ("    visible = {", "    positions = torch.arange(len(cache))\n    visible = {", True),
    },
}  # fmt: skip
