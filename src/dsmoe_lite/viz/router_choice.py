"""The chart `router_choice`: which experts does one token use, in routers of several generations?"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

from dsmoe_lite.common.errors import require, require_choice, require_int
from dsmoe_lite.config import MoEConfig
from dsmoe_lite.viz import theme
from dsmoe_lite.viz.controls import Control
from dsmoe_lite.viz.helpers import data, flatten_packed

D_MODEL = 32  # of the made-up tokens
COLUMNS, GAP, SIDE = 32, 0.7, 0.84  # squares in a row; gap between groups and side of a square, in squares
WIDTH, ROW_HEIGHT = 600, 17  # px
SCORES = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "√softplus"}


def router_choice(
    models: Mapping[str, MoEConfig],
    *,
    model: str,
    n_tokens: int = 8,
    title: str = "Which experts does a token use?",
    subtitle: str = "A router with random weights. Outlined: the groups that the token may reach.",
    description: str = "",
) -> alt.LayerChart:
    """Draw all experts of a layer as squares, those that one random token uses filled, its groups outlined.

    models: by name, with routers that choose by scores, and at most 32 groups. A menu chooses the model, which is
    `model` at first, and a slider one of n_tokens tokens; both work without a kernel.
    """
    require_choice("model", model, models)
    require_int("n_tokens", n_tokens, 3)
    for name, config in models.items():
        by_scores = config.chooser == "token" and config.scoring_func in SCORES
        require(by_scores, f"router of {name}", config.scoring_func, "tokens must choose their experts by scores")
        require(config.n_group <= COLUMNS, f"n_group of {name}", config.n_group, f"must be at most {COLUMNS}")
    squares: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    frames: list[dict[str, Any]] = []
    words, n_rows = [], 0
    for name, config in models.items():
        per_group = config.n_routed_experts // config.n_group
        columns = COLUMNS // config.n_group
        places = [_place(e, per_group, columns) for e in range(config.n_routed_experts)]
        n_rows = max(n_rows, -(-per_group // columns))
        squares.append({"model": name, **_packed(range(config.n_routed_experts), places)})
        words.append({"model": name, "text": _facts(config)})
        for token, (ids, groups) in enumerate(_choices(config, n_tokens), start=1):
            chosen.append({"model": name, "token": token, **_packed(ids, [places[e] for e in ids])})
            frames += [{"model": name, "token": token, **_frame(group, per_group, columns)} for group in groups]
    controls = Control("model", "Model", model), Control("token", "Token", 1)
    description = description or (
        f"Squares for the experts of {', '.join(models)}, of which a menu shows one: {model}, "
        f"{_facts(models[model]).replace('|', '; ')}. "
        f"The experts of one of {n_tokens} random tokens are filled."
    )
    most_groups = max(config.n_group for config in models.values())
    scale_x = alt.Scale(domain=[-0.3, COLUMNS + (most_groups - 1) * GAP + 0.3], nice=False)
    scale_y = alt.Scale(domain=[-2.4, n_rows + 0.3], nice=False, reverse=True)
    x, y = alt.X("x:Q", axis=None, scale=scale_x), alt.Y("y:Q", axis=None, scale=scale_y)
    ends, height = {"x2": "x2:Q", "y2": "y2:Q"}, ROW_HEIGHT * (n_rows + 2.7)

    def shown(rows: list[dict[str, Any]]) -> Any:
        chart = alt.Chart(data(rows))
        for control in controls:
            chart = control.filter(chart)
        return chart

    def rects(rows: list[dict[str, Any]], role: str) -> Any:
        each = flatten_packed(shown(rows), ["expert", "x", "y"]).transform_calculate(
            x2=f"datum.x + {SIDE}", y2=f"datum.y + {SIDE}", name="'e' + datum.expert"
        )
        mark = each.mark_rect(color=theme.LIGHT[role], cornerRadius=2)
        return mark.encode(x=x, y=y, tooltip=[alt.Tooltip("name:N", title="expert")], **ends)

    outline = shown(frames).mark_rect(filled=False, stroke=theme.LIGHT["muted"], cornerRadius=3)
    text = shown(words).mark_text(align="left", baseline="top", lineBreak="|", color=theme.LIGHT["muted"])
    layers = [
        rects(squares, "grid"),
        outline.encode(x=x, y=y, **ends),
        rects(chosen, "line1"),
        text.encode(x=alt.value(4), y=alt.value(0), text="text:N"),
    ]
    chart = alt.layer(*layers).properties(width=WIDTH, height=height)
    params = [control.param(rows) for control, rows in zip(controls, (squares, chosen), strict=True)]
    return theme.finish(chart.add_params(*params), title, subtitle, description)


def _place(expert: int, per_group: int, columns: int) -> tuple[float, float]:
    group, within = divmod(expert, per_group)
    row, column = divmod(within, columns)
    return group * (columns + GAP) + column, row


def _packed(experts: Iterable[int], places: Sequence[tuple[float, float]]) -> dict[str, str]:
    x, y = ([f"{place[axis]:.4g}" for place in places] for axis in (0, 1))
    return {"expert": " ".join(map(str, experts)), "x": " ".join(x), "y": " ".join(y)}


def _frame(group: int, per_group: int, columns: int) -> dict[str, float]:
    x = group * (columns + GAP)
    return {"x": x - 0.2, "x2": x + columns + 0.04, "y": -0.2, "y2": -(-per_group // columns) + 0.04}


def _choices(config: MoEConfig, n_tokens: int) -> list[tuple[list[int], list[int]]]:
    """The experts of random tokens by a router with random weights, and the groups that each token may reach."""
    import torch  # here, so that importing charts stays fast

    from dsmoe_lite.layers.router import Router
    from dsmoe_lite.layers.selection import limit_groups

    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        router = Router(D_MODEL, config, vocab_size=1).eval()
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator))
        routing = router(torch.randn(n_tokens, D_MODEL, generator=generator), (1, n_tokens))
    if config.topk_group == config.n_group:
        return [(ids, []) for ids in routing.topk_ids.tolist()]
    left = limit_groups(routing.scores, config.n_group, config.topk_group, config.group_score).isfinite()
    reached = left.view(n_tokens, config.n_group, -1).any(dim=-1)
    return [(ids, row.nonzero()[:, 0].tolist()) for ids, row in zip(routing.topk_ids.tolist(), reached, strict=True)]


def _facts(config: MoEConfig) -> str:
    groups = f", from {config.topk_group} of {config.n_group} groups" if config.topk_group < config.n_group else ""
    bias = " and a bias, 0 here" if config.expert_bias else ""
    shared = f", and {config.n_shared_experts} shared" if config.n_shared_experts else ""
    return f"{SCORES[config.scoring_func]} scores{bias}|{config.top_k} of {config.n_routed_experts}{groups}{shared}"
