"""Counts compared with the papers, with a loop over matrices, and with the model itself."""

import json
import math
import re
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_lite.accounting import (
    attention_kind,
    cache_rows,
    formula_flops,
    kv_cache_bytes,
    kv_cache_elements,
    parameters,
    training_flops,
)
from dsmoe_lite.cli import main
from dsmoe_lite.cli.count import command
from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AnyAttention, AttentionConfig, MLAConfig, ModelConfig, MoEConfig, from_dict, to_dict
from dsmoe_lite.presets import PRESETS, preset
from dsmoe_lite.study import published

PUBLISHED = published.load()
PRINTED = [(name, entry) for name, model in PUBLISHED["models"].items() for entry in model["printed"]]
COURSE = ["course-dense", "course-dense-x2", "course-gshard", "course-switch", "course-hash", "course-deepseekmoe"]


def as_printed(value: float, text: str) -> str:
    """`value` in the unit and with the decimals of a printed figure: (4.333e12, "4.3T") -> "4.3T"."""
    decimals, unit = re.fullmatch(r"\d+\.?(\d*)([BT])", text).groups()
    return f"{value / {'B': 1e9, 'T': 1e12}[unit]:.{len(decimals)}f}{unit}"


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]['quantity']}")
        for case in PRINTED
        if case[1]["quantity"] != "pile_loss"
    ],
)
def test_printed_figures_of_the_validation_models(name: str, entry: dict[str, str]) -> None:
    counted = parameters(preset(name))
    values = {
        "total": [counted.total],
        # at this size, the three conventions agree to one decimal
        "active": [counted.active_all, counted.active_no_input_embed, counted.active_no_embed],
        "expert_total": [counted.ffn.total],
        "expert_active": [counted.ffn.active],
        "flops_2k": [training_flops(preset(name), 2048).total],
    }[entry["quantity"]]
    assert {as_printed(value, entry["text"]) for value in values} == {entry["text"]}


def test_only_one_convention_gives_the_activated_size_of_16b() -> None:
    entry = PUBLISHED["activated_convention"]
    counted = parameters(from_dict(ModelConfig, entry["config"]))
    assert as_printed(counted.total, entry["total"]) == entry["total"] == "16.4B"
    assert as_printed(counted.active_all, entry["active"]) == entry["active"] == "2.8B"
    assert as_printed(counted.active_no_input_embed, "2.8B") == "2.6B"
    assert as_printed(counted.active_no_embed, "2.8B") == "2.4B"


@pytest.mark.parametrize("row", PUBLISHED["flops"]["rows"], ids=lambda row: row["model"])
def test_flops_rows(row: dict) -> None:
    numbers = {key: row[key] for key in ("n_layers", "d_model", "vocab_size", "ffn_units", "seq_len")}
    # The formula misses only Table 6's 585.6T, by 0.02%; published.json records it.
    expected = "585.5T" if row["model"] == "DeepSeekMoE 145B" else row["text"]
    assert as_printed(formula_flops(**numbers), row["text"]) == expected


def test_every_entry_names_a_known_source() -> None:
    papers = set(PUBLISHED["sources"])

    def visit(value: object) -> int:
        if isinstance(value, list):
            return sum(visit(item) for item in value)
        if not isinstance(value, dict):
            return 0
        for key in ("source", "inputs_from"):
            assert set(re.findall(r"arXiv:\d+\.\d+", value.get(key, ""))) <= papers
        return ("source" in value) + sum(visit(item) for item in value.values())

    assert visit(PUBLISHED) > len(PRINTED)
    listed = [entry for key in ("discrepancies", "shared_experts", "combinations") for entry in PUBLISHED[key]]
    for part in ("formulas", "computed", "published"):
        listed += PUBLISHED["kv_cache"][part]
    listed += PUBLISHED["family"]["rows"] + PUBLISHED["yarn"]["models"]
    for entry in [*listed, *PUBLISHED["flops"]["rows"], *(entry for _, entry in PRINTED)]:
        assert entry["source"].strip()


def test_combinations() -> None:
    for entry in PUBLISHED["combinations"]:
        assert math.comb(entry["n"], entry["k"]) == entry["value"]


def attention_matrices(D: int, attention: AnyAttention) -> list[tuple[str, tuple[int, ...], bool]]:
    """Every weight of the attention in one block, head by head."""
    shapes: list[tuple[int, ...]] = []
    norms: list[tuple[int, ...]] = []
    if isinstance(attention, AttentionConfig):
        d, kv_heads = attention.head_dim, attention.n_kv_heads or attention.n_heads
        shapes += [(D, d)] * attention.n_heads  # queries
        shapes += [(D, d)] * kv_heads + [(D, d)] * kv_heads  # keys, values
        shapes += [(d, D)] * attention.n_heads  # output
    else:
        nope, rope, v = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
        latent, q_latent = attention.kv_lora_rank, attention.q_lora_rank
        shapes += [(D, latent), (D, rope)]  # W^DKV, W^KR
        norms += [(latent,)]
        if q_latent is not None:
            shapes += [(D, q_latent)]  # W^DQ
            norms += [(q_latent,)]
        for _ in range(attention.n_heads):
            shapes += [(q_latent or D, nope), (q_latent or D, rope)]  # W^UQ, W^QR
            shapes += [(latent, nope), (latent, v), (v, D)]  # W^UK, W^UV, W^O
    return [("attention", shape, True) for shape in shapes] + [("norms", shape, True) for shape in norms]


def matrices(config: ModelConfig) -> list[tuple[str, tuple[int, ...], bool]]:
    """Every weight of the model: (component, shape, whether token 0 meets it)."""
    D = config.d_model
    weights = [("embed_in", (config.vocab_size, D), True), ("norms", (D,), True)]
    if not config.tie_embeddings:
        weights.append(("lm_head", (D, config.vocab_size), True))
    for layer in range(config.n_layers):
        weights += [("norms", (D,), True)] * 2 + attention_matrices(D, config.attention)
        index = layer - config.n_dense_layers  # 0 for the first block that may have experts
        if config.moe is None or index < 0 or index % config.interleave != config.interleave - 1:
            weights += [("dense_ffn", shape, True) for shape in ((D, config.ffn_width),) * 2 + ((config.ffn_width, D),)]
            continue
        F = config.moe.expert_width
        if config.moe.scoring_func != "hash":
            weights += [("router", (config.moe.n_routed_experts, D), True)] * (1 + config.moe.noisy_gating)
        for expert in range(config.moe.n_routed_experts):
            weights += [("routed_experts", shape, expert < config.moe.top_k) for shape in ((D, F), (D, F), (F, D))]
        for _ in range(config.moe.n_shared_experts):
            weights += [("shared_experts", shape, True) for shape in ((D, F), (D, F), (F, D))]
    return weights


@st.composite
def attentions(draw: st.DrawFn) -> AnyAttention:
    small = st.integers(1, 5)
    if draw(st.booleans()):
        kv_heads, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        n_kv_heads = draw(st.sampled_from([None, kv_heads]))
        window = draw(st.none() | st.integers(1, 9))
        return AttentionConfig(
            n_heads=kv_heads * per_group, head_dim=2 * draw(small), n_kv_heads=n_kv_heads, window=window
        )
    q_lora_rank = draw(st.none() | small)
    return MLAConfig(
        n_heads=draw(small),
        qk_nope_head_dim=draw(small),
        qk_rope_head_dim=2 * draw(small),
        v_head_dim=draw(small),
        kv_lora_rank=draw(small),
        q_lora_rank=q_lora_rank,
    )


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    small = st.integers(1, 9)
    moe = None
    if draw(st.booleans()):
        experts = draw(st.integers(1, 7))
        hashed = draw(st.booleans())
        moe = MoEConfig(
            n_routed_experts=experts,
            top_k=1 if hashed else draw(st.integers(1, experts)),
            expert_width=draw(small),
            n_shared_experts=draw(st.integers(0, 3)),
            scoring_func="hash" if hashed else draw(st.sampled_from(["softmax", "sigmoid"])),
            noisy_gating=not hashed and draw(st.booleans()),
        )
    layers = draw(st.integers(1, 5))
    dense = draw(st.integers(0, layers - 1))
    return ModelConfig(
        vocab_size=draw(small),
        d_model=draw(small),
        n_layers=layers,
        attention=draw(attentions()),
        ffn_width=draw(small),
        moe=moe,
        n_dense_layers=dense,
        interleave=draw(st.integers(1, layers - dense)),
        tie_embeddings=draw(st.booleans()),
    )


@given(configs())
def test_parameters_equal_a_loop_over_matrices(config: ModelConfig) -> None:
    counted = parameters(config)
    weights = matrices(config)
    for name, count in counted.rows().items():
        assert count.total == sum(math.prod(shape) for part, shape, _ in weights if part == name)
        assert count.active == sum(math.prod(shape) for part, shape, met in weights if part == name and met)
    assert counted.total == sum(math.prod(shape) for _, shape, _ in weights)
    assert counted.active_all == sum(math.prod(shape) for _, shape, met in weights if met)
    assert counted.active_no_embed <= counted.active_no_input_embed <= counted.active_all <= counted.total
    table = config.vocab_size * config.d_model
    assert counted.active_all - counted.active_no_input_embed == (0 if config.tie_embeddings else table)
    assert counted.active_all - counted.active_no_embed == (table if config.tie_embeddings else 2 * table)


@given(configs(), st.integers(1, 20))
def test_training_flops_equal_a_loop_over_products(config: ModelConfig, seq_len: int) -> None:
    forward = 0  # a multiplication and an addition for every weight and token, and for every entry of the scores
    for part, shape, met in matrices(config):
        if met and part not in ("embed_in", "norms", "router"):
            forward += 2 * seq_len * math.prod(shape)
    if config.tie_embeddings:
        forward += 2 * seq_len * config.vocab_size * config.d_model
    mla = isinstance(config.attention, MLAConfig)
    for _ in range(config.n_layers * config.attention.n_heads):
        for _query_and_key in range(seq_len * seq_len):
            if mla:
                forward += 2 * (config.attention.qk_nope_head_dim + config.attention.qk_rope_head_dim)
            else:
                forward += 2 * config.attention.head_dim
            forward += 2 * (config.attention.v_head_dim if mla else config.attention.head_dim)
    flops = training_flops(config, seq_len)
    assert flops.total == 3 * forward
    assert flops.total + flops.router == sum(flops.rows().values())
    assert flops.forward_per_token * seq_len == forward


@given(configs(), st.integers(1, 20))
def test_training_flops_generalise_the_formula(config: ModelConfig, seq_len: int) -> None:
    D = config.d_model
    square = replace(
        config, attention=AttentionConfig(n_heads=D, head_dim=2), d_model=2 * D, n_dense_layers=0, interleave=1
    )
    moe = square.moe
    width = square.ffn_width if moe is None else (moe.top_k + moe.n_shared_experts) * moe.expert_width
    numbers = {key: getattr(square, key) for key in ("n_layers", "d_model", "vocab_size")}
    units = 3 * width / (8 * square.d_model)
    expected = formula_flops(**numbers, ffn_units=units, seq_len=seq_len)
    assert training_flops(square, seq_len).total == pytest.approx(expected, rel=1e-12)


@given(configs())
def test_one_more_expert_per_token_is_one_more_active_expert(config: ModelConfig) -> None:
    if config.moe is None or config.moe.scoring_func == "hash" or config.moe.top_k == config.moe.n_routed_experts:
        return
    before = parameters(config)
    after = parameters(replace(config, moe=replace(config.moe, top_k=config.moe.top_k + 1)))
    expert = 3 * config.d_model * config.moe.expert_width
    assert (
        after.active_all - before.active_all == (config.n_layers - config.n_dense_layers) // config.interleave * expert
    )
    assert after.total == before.total


def test_kv_cache_is_a_key_and_a_value_for_each_head_and_layer() -> None:
    assert kv_cache_elements(preset("dense-0.2B")) == 9 * 10 * 128 * 2 == 23_040
    assert kv_cache_elements(preset("course-gshard")) == 2 * 4 * 16 * 2


@pytest.mark.parametrize(
    ("attention", "kind", "elements"),
    [
        (AttentionConfig(n_heads=8, head_dim=16), "MHA", 2 * 8 * 16),
        (AttentionConfig(n_heads=8, head_dim=16, n_kv_heads=8), "MHA", 2 * 8 * 16),
        (AttentionConfig(n_heads=8, head_dim=16, n_kv_heads=2), "GQA", 2 * 2 * 16),
        (AttentionConfig(n_heads=8, head_dim=16, n_kv_heads=1), "MQA", 2 * 16),
        (AttentionConfig(n_heads=1, head_dim=16), "MHA", 2 * 16),
        (MLAConfig(n_heads=8, qk_nope_head_dim=16, qk_rope_head_dim=6, v_head_dim=10, kv_lora_rank=40), "MLA", 46),
        (
            MLAConfig(
                n_heads=80, qk_nope_head_dim=16, qk_rope_head_dim=6, v_head_dim=10, kv_lora_rank=40, q_lora_rank=12
            ),
            "MLA",
            46,
        ),  # the same for ten times the heads
    ],
)
def test_cache_elements_of_each_kind_of_attention(attention: AnyAttention, kind: str, elements: int) -> None:
    config = replace(preset("course-dense"), attention=attention)  # 2 layers
    assert kv_cache_elements(config) == 2 * elements
    assert attention_kind(attention) == kind
    assert cache_rows({"m": config}) == [{"model": "m", "kind": kind, "elements_per_token": 2 * elements}]


@given(configs(), st.integers(0, 40), st.integers(1, 64), st.integers(1, 5))
def test_cache_bytes_hold_every_bit(config: ModelConfig, n_tokens: int, bits: int, batch_size: int) -> None:
    window = getattr(config.attention, "window", None) or n_tokens
    cached = sum(1 for position in range(n_tokens) if position >= n_tokens - window)
    expected_bits = sum(bits for _ in range(batch_size * cached * kv_cache_elements(config)))
    assert 0 <= 8 * kv_cache_bytes(config, n_tokens, bits, batch_size) - expected_bits < 8


def test_cache_bytes_are_exact_and_roll_over_a_window() -> None:
    config = preset("deepseek-v3")
    assert kv_cache_bytes(config, 131_072, 16) == 131_072 * 61 * 576 * 2 == 9_210_691_584
    assert type(kv_cache_bytes(config, 131_072, 6, 3)) is int
    assert kv_cache_bytes(config, 10**15 + 1, 8) == (10**15 + 1) * 35_136  # a float would lose the last token
    tiny = replace(
        preset("course-dense"),
        n_layers=1,
        attention=MLAConfig(n_heads=1, qk_nope_head_dim=1, qk_rope_head_dim=2, v_head_dim=1, kv_lora_rank=1),
    )  # 3 numbers a token
    assert [kv_cache_bytes(tiny, 1, bits) for bits in (32, 16, 8, 6, 4, 1)] == [12, 6, 3, 3, 2, 1]
    rolling = replace(preset("course-dense"), attention=AttentionConfig(n_heads=4, head_dim=16, window=100))
    assert [kv_cache_bytes(rolling, n, 8) for n in (0, 99, 100, 101, 5000)] == [0, 99 * 256, *[100 * 256] * 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"n_tokens": -1, "bits": 16}, "n_tokens = -1"),
        ({"n_tokens": 1.5, "bits": 16}, "n_tokens = 1.5"),
        ({"n_tokens": 1, "bits": 0}, "bits = 0"),
        ({"n_tokens": 1, "bits": 65}, "bits = 65: must be a whole number of at least 1 and at most 64"),
        ({"n_tokens": 1, "bits": 4.0}, "bits = 4.0"),
        ({"n_tokens": 1, "bits": 16, "batch_size": 0}, "batch_size = 0"),
    ],
)
def test_cache_bytes_name_bad_input(call: dict, words: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(words)}") as raised:
        kv_cache_bytes(preset("course-dense"), **call)
    assert "\n" not in str(raised.value)


def test_course_presets_are_comparable() -> None:
    """They differ in the FFN only; the wide dense model has the active FFN weights of two experts."""
    counted = [parameters(preset(name)) for name in COURSE]
    dense, wide, gshard, switch, hashed, deepseekmoe = counted
    assert {(c.embed_in, c.lm_head, c.attention, c.norms) for c in counted} == {
        (dense.embed_in, dense.lm_head, dense.attention, dense.norms)
    }
    assert deepseekmoe.ffn.active == gshard.ffn.active == wide.ffn.active == 2 * dense.ffn.active
    assert switch.ffn.active == hashed.ffn.active == dense.ffn.active
    assert {c.ffn.total for c in (gshard, switch, hashed, deepseekmoe)} == {16 * dense.ffn.total}


def component(parameter: str) -> str:
    """The component of a parameter of the model, by its name."""
    for word, name in {
        "norm": "norms",
        "router": "router",
        "shared": "shared_experts",
        "experts": "routed_experts",
        "embed": "embed_in",
        "head": "lm_head",
        "attention": "attention",
        "ffn": "dense_ffn",
    }.items():
        if word in parameter:
            return name
    raise AssertionError(f"{parameter}: unknown component")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_has_the_parameters_that_are_counted(name: str, tied: bool) -> None:
    import torch

    from dsmoe_lite.model import Transformer

    config = replace(preset(name), tie_embeddings=tied)
    with torch.device("meta"):
        model = Transformer(config)
    counted = dict.fromkeys(parameters(config).rows(), 0)
    for parameter, tensor in model.named_parameters():
        counted[component(parameter)] += tensor.numel()
    assert counted == {part: count.total for part, count in parameters(config).rows().items()}


def test_an_unknown_preset_suggests_close_names() -> None:
    with pytest.raises(InputError, match=r"^preset = 'gshard-2B': there is none; close: .*gshard-2\.0B"):
        preset("gshard-2B")
    with pytest.raises(InputError, match=r"close: deepseek-v3"):
        preset("deepseek-V3")
    with pytest.raises(InputError, match=r"all: course-dense, .*dense-x16, .*grok-1$"):
        preset("#")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(command, arguments, env={"COLUMNS": "200"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_count_prints_a_table_by_component() -> None:
    output = run("gshard-2.0B")
    routed = next(line for line in output.splitlines() if "routed_experts" in line)
    assert "1,887,252,480" in routed  # 9 layers x 16 experts x 3 x 1280 x 3413
    assert "0.9593" in routed  # of 1,967,415,040
    # 2048 x (54 x (4 x 1280^2 + 6 x 1280 x 3413) + 108 x 1280 x 2048 + 6 x 8192 x 1280)
    assert "4,332,265,144,320" in output


def test_count_puts_models_side_by_side() -> None:
    header, *_ = (line for line in run("course-dense", "course-gshard").splitlines() if "course" in line)
    assert header.index("course-dense") < header.index("course-gshard")


def test_count_as_json() -> None:
    dense, gshard = json.loads(run("course-dense", "course-gshard", "--json", "--seq-len", "100"))
    assert (dense["name"], gshard["name"]) == ("course-dense", "course-gshard")
    assert dense["seq_len"] == 100
    # 2 layers of 4 x 64 x 64 + 3 x 64 x 128 weights and a head of 1024 x 64; scores: 12 x 2 x 64 x 100^2
    assert dense["training_flops"] == 600 * (2 * (16_384 + 24_576) + 65_536) + 15_360_000
    assert dense["kv_cache_elements_per_token"] == 2 * 2 * 64
    assert (dense["kv_cache_bf16_bytes_per_token"], dense["kv_cache_bf16_bytes"]) == (512, 51_200)
    router = next(row for row in gshard["components"] if row["component"] == "router")
    assert (router["total"], router["training_flops"]) == (2 * 16 * 64, 600 * 2 * 16 * 64)


def test_count_knows_the_family_and_its_cache() -> None:
    output = run("deepseek-v3", "--seq-len", "1000")
    assert "671,026,404,352" in output
    assert "70,272" in output  # a token, in bfloat16
    assert "70,272,000" in output


def test_count_reads_a_config_file(tmp_path) -> None:
    path = tmp_path / "small one.yaml"
    path.write_text(
        "{vocab_size: 10, d_model: 8, n_layers: 1, attention: {n_heads: 2, head_dim: 4}, ffn_width: 16}",
        encoding="utf-8",
    )
    (only,) = json.loads(run(str(path), "--json"))
    assert only["total"] == 2 * 80 + 4 * 64 + 3 * 128 + 3 * 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gshrd-2.0B", None, "gshard-2.0B"),
        ("absent.yaml", None, "No such file"),
        ("bad.yaml", b"a: 1\nb: [", "is not YAML: expected the node content, but found '<stream end>' in line 2"),
        ("control.yaml", b"a: \x01", "is not YAML"),
        ("date.yaml", b"a: 2001-99-99", "a = '2001-99-99': no such field"),
        ("fields.yaml", b"{1: 2}", "1 = 2: no such field; there are vocab_size"),
        ("latin.yaml", "a: é".encode("latin-1"), "is not UTF-8"),
        ("list.yaml", b"- 1", "must be a mapping"),
        ("empty.yaml", b"", "must be a mapping"),
        ("field.yaml", b"{vocab: 3}", "vocab = 3: no such field"),
        (
            "value.yaml",
            b"{vocab_size: 0, d_model: 8, n_layers: 1, ffn_width: 1, attention: {n_heads: 1, head_dim: 2}}",
            "vocab_size = 0",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(name, content, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        main(["count", name])
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.out == ""
    assert words in printed.err
    assert printed.err.count("\n") == 1


def test_count_lists_mtp_modules_apart_from_the_total(tmp_path) -> None:
    """DeepSeek-V3's module has 11.610B weights of its own (its README: 11.5B), and 671.03B is the model without it."""
    path = tmp_path / "v3.json"
    path.write_text(json.dumps(to_dict(replace(preset("deepseek-v3"), n_mtp=1))), encoding="utf-8")
    output = CliRunner().invoke(command, [str(path), "deepseek-v3"], catch_exceptions=False).output
    rows = {row[0]: row[1:] for row in map(str.split, output.splitlines()) if row}
    assert rows["mtp_total"] == ["11,610,067,968", "0"]
    assert rows["total"] == ["671,026,404,352"] * 2
    assert "mtp" not in CliRunner().invoke(command, ["deepseek-v3"], catch_exceptions=False).output
