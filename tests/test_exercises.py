"""Exercises: each stub counts as unsolved, each folded solution is right, and each wrong answer listed here fails."""

import ast
import math
import re
from functools import partial
from itertools import product

import jupytext
import pytest
import torch
import torch.nn.functional as F
from needs import needs_gxx
from scipy.stats import ttest_1samp

from dsmoe_lite.common import paths
from dsmoe_lite.labs import check_exercise
from dsmoe_lite.layers.balance import switch_loss
from dsmoe_lite.layers.rope import pairs_to_halves
from dsmoe_lite.layers.selection import limit_groups

SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.DOTALL)


def joined(routings):
    scores = torch.cat([r.scores for r in routings])
    first = torch.cat([r.topk_ids[:, 0] for r in routings])
    E = scores.shape[1]
    return E * (torch.bincount(first, minlength=E) / len(first) * scores.mean(dim=0)).sum()


def of_shares(shares, given, factor=None):
    E = shares.shape[1]
    first = torch.bincount(given.argmax(dim=-1), minlength=E) / len(given)
    return (E if factor is None else factor) * (first * shares.mean(dim=0)).sum()


def flips(differences):
    signs = product((1, -1), repeat=len(differences))
    return [sum(f * d for f, d in zip(flip, differences, strict=True)) for flip in signs]


def of_blocks(scales, weight):
    rows, columns = weight.shape
    return scales.repeat_interleave(128, dim=0)[:rows].repeat_interleave(128, dim=1)[:, :columns]


def shares(scores, ids):
    gates = scores.gather(1, ids)
    return gates / gates.sum(dim=1, keepdim=True)


def violation(counts, kappa):
    return torch.tanh(kappa * (1 - counts / counts.float().mean()))


def centred(step):
    return step - step.mean()


def count_only_what_is_sent(chosen, second_gate, draw, slots):
    count = torch.bincount(chosen[:, 0], minlength=8).tolist()
    sent = []
    for (_, second), gate, chance in zip(chosen.tolist(), second_gate, draw, strict=True):
        sent.append(bool(count[second] < slots and 2 * gate > chance))
        count[second] += sent[-1]
    return sent


def forget_first_choices(chosen, second_gate, draw, slots):
    count, sent = [0] * 8, []
    for (_, second), gate, chance in zip(chosen.tolist(), second_gate, draw, strict=True):
        sent.append(bool(count[second] < slots and 2 * gate > chance))
        count[second] += 1
    return sent


def right_but_for_ties(chosen, second_gate, draw, slots):
    count = torch.bincount(chosen[:, 0], minlength=8).tolist()
    sent = []
    for (_, second), gate, chance in zip(chosen.tolist(), second_gate, draw, strict=True):
        sent.append(bool(count[second] < slots and 2 * gate >= chance))
        count[second] += 1
    return sent


def halves_to_pairs(x, dim):
    """The inverse of pairs_to_halves."""
    return x.index_select(dim, torch.arange(x.shape[dim]).view(2, -1).T.flatten())


def turned(change):
    return lambda W, n_heads, nope, rope: change(W.unflatten(0, (n_heads, -1)), nope, rope).flatten(0, 1)


def finest_that(width, fits):
    return max((m for m in range(1, width + 1) if width % m == 0 and fits(m)), default=1)


def beside(gates, weight):
    return torch.cat((gates, torch.full((len(gates), 1), weight)), dim=1)


def side_by_side(gate, up, down, factor=1.0, *, turned=False):
    if turned:
        down = down[::-1]
    return torch.cat(list(gate)), torch.cat(list(up)), factor * torch.cat(list(down), dim=1)


def pairs_at(counted, topk_ids, n_experts, both_ways=True):
    """How often two experts have ranks i and j of one token, for the pairs of ranks that `counted` accepts."""
    counts, K = torch.zeros(n_experts, n_experts, dtype=torch.long), topk_ids.shape[1]
    ranks = [(i, j) for i in range(K) for j in range(i + 1, K) if counted(i, j, K)]
    for i, j in ranks:
        for a, b in topk_ids[:, [i, j]].tolist():
            counts[a, b] += 1
            counts[b, a] += both_ways
    return counts


def limited_with(fill, worth="top2"):
    """A choice of experts that sets scores outside the best groups to `fill`."""

    def choose(biased, n_group, topk_group, k):
        open_ = limit_groups(biased, n_group, topk_group, worth).isfinite()
        return biased.where(open_, fill(biased)).topk(k).indices

    return choose


def sends_of(count):
    """The sum over tokens of `count(devices of its experts, its home device)`, without id -1."""
    return lambda ids, on, home: sum(
        count([int(on[e]) for e in row if e >= 0], own)
        for row, own in zip(ids.tolist(), home.tolist(), strict=True)
    )  # fmt: skip


def of_sums(gates, ids, n):
    """The sum of each expert's gates."""
    return torch.zeros(n).index_add(0, ids.flatten(), gates.flatten())


def spread(x):
    """The squared coefficient of variation."""
    return x.var(unbiased=False) / x.mean() ** 2


def kth_of_all(noisy, k):
    """The k-th largest noisy logit of each token, the expert itself included."""
    return noisy.topk(k).values[:, -1:]


def kth_of_others(noisy, k):
    """For each token and expert, the k-th largest noisy logit of the other experts."""
    best = noisy.topk(k + 1).values
    return torch.where(noisy >= best[:, k - 1 : k], best[:, k : k + 1], best[:, k - 1 : k])


def share_of_words(words, first, least):
    """The mean share of a word's tokens at its favourite expert."""
    by_word = {word: [e for w, e in zip(words, first, strict=True) if w == word] for word in words}
    shares = [max(map(of.count, of)) / len(of) for of in by_word.values() if len(of) >= least]
    return sum(shares) / len(shares)


def share_of_all_tokens(words, first, least):
    """Every token counts once, not every word."""
    by_word = {word: [e for w, e in zip(words, first, strict=True) if w == word] for word in words}
    kept = [of for of in by_word.values() if len(of) >= least]
    return sum(max(map(of.count, of)) for of in kept) / sum(map(len, kept))


def count_numbers(result):
    """How many numbers an answer has, in tensors, lists and tuples."""
    if isinstance(result, torch.Tensor):
        return result.numel()
    return sum(map(count_numbers, result)) if isinstance(result, list | tuple) else 1


WRONG = {
    "00": {"ways": [lambda: (240, 4426165368), lambda: (120, 64**8), lambda: (120, 4426165369), lambda: "many"]},
    "01": {
        "halves_order": [
            lambda d: list(range(d)),
            lambda d: [*range(1, d, 2), *range(0, d, 2)],
            lambda d: [i for j in range(d // 2) for i in (j, j + d // 2)],  # the way back, not the way there
            lambda d: [0] * d,
        ],
        "swiglu_width": [
            lambda d: 4 * d,
            lambda d: 2 * d,
            lambda d: 8 * d / 3,
            lambda d: int(8 * d / 3) + 2,
            lambda d: round(4 * d / 3),
        ],
    },
    "02": {
        "mended_loss": [
            joined,
            lambda routings: sum(switch_loss(r) for r in routings),
            lambda routings: switch_loss(routings[0]),
            lambda routings: sum(switch_loss(r) for r in routings) / 2,
            lambda routings: max(switch_loss(r) for r in routings),
            lambda routings: sum(switch_loss(r) for r in routings) / len(routings) / routings[0].n_experts,
        ],
        "second_sent": [
            count_only_what_is_sent,
            forget_first_choices,
            lambda chosen, gate, draw, slots: (2 * gate > draw).tolist(),
            right_but_for_ties,
            lambda chosen, gate, draw, slots: [False] * len(chosen),
            lambda chosen, gate, draw, slots: [slots > 2] * len(chosen),
        ],
    },
    "03": {
        "mended_load": [
            lambda ids, padding, n: torch.bincount(ids.flatten(), minlength=n) / ids.numel(),  # the libraries'
            lambda ids, padding, n: torch.bincount(ids[~padding].flatten(), minlength=n) / ids.numel(),
            lambda ids, padding, n: torch.bincount(ids[~padding].flatten()) / ids[~padding].numel(),
            lambda ids, padding, n: torch.bincount(ids[~padding, 0], minlength=n) / int((~padding).sum()),
            lambda ids, padding, n: torch.bincount(ids[padding].flatten(), minlength=n) / max(ids[padding].numel(), 1),
            lambda ids, padding, n: torch.bincount(ids[~padding].flatten(), minlength=n),
        ],
        "favourite_share": [
            share_of_all_tokens,
            lambda words, first, least: share_of_words(words, first, 1),
            lambda words, first, least: share_of_words(words, first, least + 1),
            lambda words, first, least: 1.0,
        ],
    },
    "04": {
        "mended_gates": [
            lambda logits, k: logits.topk(k, dim=-1).values.softmax(dim=-1),  # the library's
            lambda logits, k: F.normalize(logits.softmax(-1).topk(k, dim=-1).values, p=1, dim=-1),
            lambda logits, k: logits.topk(k, dim=-1).values.exp(),
            lambda logits, k: logits.sigmoid().topk(k, dim=-1).values,
            lambda logits, k: logits.softmax(dim=0).topk(k, dim=-1).values,
            lambda logits, k: logits.softmax(dim=-1)[:, :k],
            lambda logits, k: logits.softmax(dim=-1),
            lambda logits, k: logits.softmax(dim=-1).topk(k, dim=-1).indices,
            lambda logits, k: logits.softmax(dim=-1).topk(k, dim=-1).values.flip(-1),
            lambda logits, k: k * logits.softmax(dim=-1).topk(k, dim=-1).values,
        ],
        "finest": [
            lambda E, K, width, share: int(share * 3 * K * width / E),  # need not divide the width
            lambda E, K, width, share: finest_that(width, lambda m: m * E <= share * K * width),
            lambda E, K, width, share: finest_that(width, lambda m: m * E <= share * 3 * width),
            lambda E, K, width, share: finest_that(width, lambda m: m * E <= share * 3 * E * width),
            lambda E, K, width, share: finest_that(width, lambda m: m * m * E <= share * 3 * K * width),
            lambda E, K, width, share: finest_that(width, lambda m: m * E < share * 3 * K * width),
            lambda E, K, width, share: 2 ** int(math.log2(max(1, share * 3 * K * width / E))),  # powers of 2 only
            lambda E, K, width, share: 4,
        ],
    },
    "05": {
        "mended_fusion": [
            lambda gates, scale, already: beside(gates, 1 / scale),  # the engine's
            lambda gates, scale, already: beside(gates, 1.0),
            lambda gates, scale, already: beside(gates, 1 / scale if already else 1.0),  # the wrong way round
            lambda gates, scale, already: beside(gates, scale if already else 1.0),
            lambda gates, scale, already: beside(gates if already else gates * scale, 1.0),  # scaled twice later
            lambda gates, scale, already: beside(gates / scale if already else gates, 1 / scale),
            lambda gates, scale, already: gates,
            lambda gates, scale, already: beside(gates, 1.0 if already else 1 / scale).flip(1),
            lambda gates, scale, already: beside(gates, 1.0 if already else 1 / 2.5),
        ],
        "merged": [
            lambda ffns: ffns[0],
            lambda ffns: tuple(torch.cat(weights) for weights in zip(*ffns, strict=True)),
            lambda ffns: side_by_side([ffn[0] for ffn in ffns], [ffn[0] for ffn in ffns], [ffn[2] for ffn in ffns]),
            lambda ffns: side_by_side(*zip(*ffns, strict=True), factor=1 / len(ffns)),
            lambda ffns: side_by_side(*zip(*ffns, strict=True), turned=True),
            lambda ffns: side_by_side(*zip(*((up, gate, down) for gate, up, down in ffns), strict=True)),
        ],
    },
    "06": {
        "mended_total": [
            lambda text, routings, step, alpha: text,
            lambda text, routings, step, alpha: (
                text + alpha * sum(float(switch_loss(r)) for r in routings) / len(routings) if step > 1 else text
            ),  # the library's
            lambda text, routings, step, alpha: text + alpha * sum(float(switch_loss(r)) for r in routings),
            lambda text, routings, step, alpha: text + sum(float(switch_loss(r)) for r in routings) / 3,
            lambda text, routings, step, alpha: text + alpha * float(switch_loss(routings[0])),  # fails without layers
        ],
        "importance": [
            lambda gates, ids, n: of_sums(gates, ids, n).var() / of_sums(gates, ids, n).mean() ** 2,  # of a sample
            lambda gates, ids, n: of_sums(gates, ids, n).std(unbiased=False) / of_sums(gates, ids, n).mean(),
            lambda gates, ids, n: spread(of_sums(gates * 0 + 1, ids, n)),  # of counts
            lambda gates, ids, n: of_sums(gates, ids, n).var(unbiased=False),
        ],
        "noisy_load": [
            lambda h, H, sigma, K: spread(torch.special.ndtr((h - kth_of_all(H, K)) / sigma).sum(0)),
            lambda h, H, sigma, K: spread(torch.special.ndtr((H - kth_of_others(H, K)) / sigma).sum(0)),
            lambda h, H, sigma, K: spread(torch.special.ndtr(h - kth_of_others(H, K)).sum(0)),
            lambda h, H, sigma, K: spread(torch.special.ndtr((h - kth_of_others(H, 1)) / sigma).sum(0)),
            lambda h, H, sigma, K: spread((h > kth_of_others(H, K)).float().sum(0)),
        ],
    },
    "09": {
        "ported": [
            lambda W, n_heads, nope, rope: W,  # as it was
            lambda W, n_heads, nope, rope: (
                pairs_to_halves(W, dim=0) if len(W) % 2 == 0 else W
            ),  # across heads and parts
            turned(lambda part, nope, rope: torch.cat((part[:, :nope], halves_to_pairs(part[:, nope:], 1)), 1)),
            turned(
                lambda part, nope, rope: (
                    torch.cat((part[:, :rope], pairs_to_halves(part[:, rope:], 1)), 1)
                    if (part.shape[1] - rope) % 2 == 0
                    else part
                )
            ),
            turned(lambda part, nope, rope: torch.cat((part[:, :nope], part[:, nope:].flip(1)), 1)),
            turned(lambda part, nope, rope: torch.cat((pairs_to_halves(part[:, nope:], 1), part[:, :nope]), 1)),
            turned(lambda part, nope, rope: torch.cat((part[:, :nope], pairs_to_halves(part[:, nope:], 1)), 1).flip(0)),
            lambda W, n_heads, nope, rope: torch.cat(  # all plain channels first, then all turned ones
                [part.flatten(0, 1) for part in W.unflatten(0, (n_heads, -1)).split((nope, rope), dim=1)]
            ),
        ],
        "folded": [
            lambda W_O, W_UV: W_O @ W_UV.flatten(0, 1),  # adds up the heads
            lambda W_O, W_UV: torch.einsum("ohv,hvc->ohc", W_O.unflatten(1, (W_UV.shape[0], -1)), W_UV).sum(1),
            lambda W_O, W_UV: torch.einsum("ohv,hvc->och", W_O.unflatten(1, (W_UV.shape[0], -1)), W_UV).flatten(1),
            lambda W_O, W_UV: torch.einsum("ovh,hvc->ohc", W_O.unflatten(1, (-1, W_UV.shape[0])), W_UV).flatten(1),
            lambda W_O, W_UV: torch.einsum("ohv,hvc->ohc", W_O.unflatten(1, (W_UV.shape[0], -1)), W_UV.flip(0)).flatten(
                1
            ),
            lambda W_O, W_UV: 2 * torch.einsum("ohv,hvc->ohc", W_O.unflatten(1, (W_UV.shape[0], -1)), W_UV).flatten(1),
        ],
    },
    "07": {
        "mended_loss": [
            lambda given, are_logits: of_shares(given.softmax(dim=-1), given),  # as it was
            lambda given, are_logits: of_shares(given, given),
            lambda given, are_logits: of_shares(given if are_logits else given.softmax(dim=-1), given),
            lambda given, are_logits: of_shares(given.softmax(dim=-1) if are_logits else given, given, factor=1),
            lambda given, are_logits: of_shares(given.softmax(dim=-1) if are_logits else given.log().softmax(0), given),
        ],
        "sign_flip_p": [
            lambda d: sum(s >= sum(d) - 1e-12 for s in flips(d)) / 2 ** len(d),  # one-sided
            lambda d: sum(abs(s) > abs(sum(d)) + 1e-12 for s in flips(d)) / 2 ** len(d),  # without ties
            lambda d: (sum(abs(s) >= abs(sum(d)) - 1e-12 for s in flips(d)) - 1) / (2 ** len(d) - 1),  # nor itself
            lambda d: 1 / 2 ** len(d),
            lambda d: float(ttest_1samp(d, 0).pvalue) if len(d) > 1 else 1.0,
        ],
    },
    "08": {
        "all_pairs": [
            partial(pairs_at, lambda i, j, K: j == i + 1),  # as it was
            partial(pairs_at, lambda i, j, K: i == 0),  # the first with the others
            partial(pairs_at, lambda i, j, K: i < j, both_ways=False),
            lambda ids, E: (
                pairs_at(lambda i, j, K: i < j, ids, E) + torch.diag(torch.bincount(ids.flatten(), minlength=E))
            ),
            lambda ids, E: pairs_at(lambda i, j, K: i < j, ids, E) / len(ids),
            lambda ids, E: pairs_at(lambda i, j, K: i < j, ids, E)[:4, :4],
        ],
        "settled_share": [
            lambda then, final: (then == final).float().mean().item(),  # place by place
            lambda then, final: (final[:, :, None] == then[:, None, :]).any(dim=2).any(dim=1).float().mean().item(),
            lambda then, final: (final[:, :, None] == then[:, None, :]).any(dim=2).all(dim=1).float().mean().item(),
            lambda then, final: (final[:, :1] == then).any(dim=1).float().mean().item(),  # first choices
            lambda then, final: torch.isin(final, then).float().mean().item(),  # of any token
            lambda then, final: (final[:, :, None] == then[:, None, :]).any(dim=2).float().sum(dim=1).mean().item(),
        ],
    },
    "10": {
        "mended": [
            lambda kernel: kernel,
            lambda kernel: kernel.replace("= end;\n", "= end;\n    __syncthreads();\n"),  # not all threads come there
            lambda kernel: kernel.replace(
                "  if (threadIdx.x < experts)", "  __syncthreads();\n  if (threadIdx.x < experts)"
            ),
            lambda kernel: kernel.replace("  for (int t", "  __syncwarp();\n  for (int t"),
            lambda kernel: kernel.replace("tile - 1", "tile"),
        ],
        "stands": [
            lambda row, piece: piece,
            lambda row, piece: piece ^ (row % 4),
            lambda row, piece: piece ^ (row // 4 % 4),
            lambda row, piece: row // 2 % 4,
        ],
    },
    "11": {
        "mended_choice": [
            limited_with(torch.zeros_like),  # as it was
            lambda biased, n_group, topk_group, k: biased.topk(k).indices,
            limited_with(lambda biased: torch.full_like(biased, -1.0)),
            limited_with(lambda biased: torch.full_like(biased, -torch.inf), worth="max"),
            lambda biased, n_group, topk_group, k: limited_with(torch.zeros_like)(
                biased.clamp(min=1e-6), n_group, topk_group, k
            ),
            lambda biased, n_group, topk_group, k: limited_with(torch.zeros_like)(biased.abs(), n_group, topk_group, k),
            limited_with(lambda biased: torch.full_like(biased, torch.inf)),
            lambda biased, n_group, topk_group, k: limited_with(lambda b: torch.full_like(b, -torch.inf))(
                biased, n_group, topk_group, 2 * k
            ),
        ],
        "sends": [
            sends_of(lambda devices, own: len(devices)),
            sends_of(lambda devices, own: len(set(devices))),
            sends_of(lambda devices, own: sum(d != own for d in devices)),
            sends_of(lambda devices, own: len(set(devices)) - 1),
            sends_of(lambda devices, own: max(0, len(set(devices)) - 1)),
            sends_of(lambda devices, own: len(set(devices) - {own}) / 2),
            lambda *given: sends_of(lambda devices, own: len(set(devices) - {own}))(*given) + 0.9,  # no whole number
            lambda ids, on, home: sum(  # id -1 taken for the last expert
                len({int(on[e]) for e in row} - {own}) for row, own in zip(ids.tolist(), home.tolist(), strict=True)
            ),
        ],
    },
    "12": {
        "mended": [
            lambda sums, sharing: sums.mean(dim=0),  # the bug
            lambda sums, sharing: sums.sum(dim=0),
            lambda sums, sharing: sums.sum(dim=0) / sharing,
            lambda sums, sharing: sums.mean(dim=0) / len(sums),
        ],
        "rows_across": [
            lambda ids, home, per_device, node: F.one_hot(ids // per_device // node).amax(dim=1).sum(dim=1),  # own too
            lambda ids, home, per_device, node: (  # a row a choice
                (ids // per_device // node != (home // node)[:, None]).sum(dim=1)
            ),
            lambda ids, home, per_device, node: (  # devices for nodes
                F.one_hot(ids // per_device).amax(dim=1).sum(dim=1)
                - (ids // per_device == home[:, None]).any(dim=1).long()
            ),
            lambda ids, home, per_device, node: (  # one's own node is always among them
                F.one_hot(ids // per_device // node).amax(dim=1).sum(dim=1) - 1
            ),
        ],
    },
    "13": {
        "state_first": [
            lambda eh_proj: eh_proj,  # the bug
            lambda eh_proj: eh_proj.flip(1),  # columns in reverse
            lambda eh_proj: eh_proj.flip(0),
            lambda eh_proj: torch.cat((eh_proj[:4], eh_proj[4:])),
            lambda eh_proj: torch.cat((eh_proj[:, 8:], eh_proj[:, 8:]), dim=1),
        ],
        "restore": [
            lambda weight, inv: weight.float() / of_blocks(inv, weight),  # as its name says
            lambda weight, inv: weight.float(),
            lambda weight, inv: weight.float() * inv.repeat_interleave(128, 0).repeat_interleave(128, 1),  # partial
            lambda weight, inv: weight.float() * inv.mean(),
            lambda weight, inv: weight.float() * of_blocks(inv[:, :1].expand_as(inv), weight),
        ],
    },
    "14": {
        "gates_for_both": [
            lambda scores, ids, norm, scale: (  # the bug
                shares(scores, ids) if norm else scores.gather(1, ids) * scale
            ),
            lambda scores, ids, norm, scale: shares(scores, ids) * scale,
            lambda scores, ids, norm, scale: scores.gather(1, ids) * scale,
            lambda scores, ids, norm, scale: (  # divides by the sum over all experts
                scale * scores.gather(1, ids) / (scores.sum(dim=1, keepdim=True) if norm else 1)
            ),
        ],
        "bounded_step": [
            lambda bias, counts, speed, kappa: bias + speed * (counts.float().mean() - counts).sign(),  # not bounded
            lambda bias, counts, speed, kappa: bias + speed * violation(counts, kappa),  # the mean is left
            lambda bias, counts, speed, kappa: bias - speed * centred(violation(counts, kappa)),
            lambda bias, counts, speed, kappa: bias.add_(speed * centred(violation(counts, kappa))),  # in place
            lambda bias, counts, speed, kappa: (
                bias + speed * centred(torch.tanh(kappa * (counts.float().mean() - counts)))
            ),
        ],
    },
}
ONE_ANSWER = {("00", "ways"), ("10", "mended")}  # the check asks once
EXERCISES = [
    pytest.param(number, name, marks=needs_gxx if number == "10" else ())
    for number, exercises in WRONG.items()
    for name in exercises
]


def chapter(number: str) -> tuple[dict, dict, dict]:
    """A chapter's functions, {exercise: check} and {exercise: solution}; none of its other code runs."""
    (path,) = paths.NOTEBOOKS.glob(f"{number}_*.py")
    cells = jupytext.read(path).cells
    body, calls = [], []
    for cell in cells:
        if cell.cell_type == "code":
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
                    body.append(node)
                elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "verdict":
                    calls.append(tuple(argument.id for argument in node.value.args))
    names: dict = {"torch": torch, "F": F}
    exec(compile(ast.Module(body, []), str(path), "exec"), names)
    solutions = {}
    for source in SOLUTION.findall("\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")):
        solved = dict(names)
        exec(source, solved)
        solutions |= {node.name: solved[node.name] for node in ast.parse(source).body if hasattr(node, "name")}
    return names, {name: names[check] for name, check in calls}, solutions


def test_every_exercise_of_every_chapter_is_listed() -> None:
    assert {path.name[:2] for path in paths.NOTEBOOKS.glob("[0-9]*.py")} == set(WRONG)
    for number, exercises in WRONG.items():
        _, checks, solutions = chapter(number)
        assert set(checks) == set(solutions) == set(exercises)


@pytest.mark.parametrize(("number", "name"), EXERCISES)
def test_stub_solution_and_wrong_answers(number: str, name: str, capsys: pytest.CaptureFixture) -> None:
    names, checks, solutions = chapter(number)
    assert check_exercise(names[name], checks[name]) is None
    asked = {}

    def solution(*args):
        result = solutions[name](*args)
        asked[repr(args)] = count_numbers(result)
        return result

    assert check_exercise(solution, checks[name]) is True, capsys.readouterr().out
    assert (number, name) in ONE_ANSWER or sum(asked.values()) >= 30, "few enough to pass with a memorised table"
    for wrong in WRONG[number][name]:
        assert check_exercise(wrong, checks[name]) is False
    assert "not right yet: " in capsys.readouterr().out
