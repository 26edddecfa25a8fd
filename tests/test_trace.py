"""RoutingTrace: equal to the model's routing, unchanged by save and load, and bad files refused in one line."""

from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig
from dsmoe_lite.data.corpus import Document
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing import trace as module
from dsmoe_lite.routing.metrics import drop_rate, load
from dsmoe_lite.routing.token_types import TYPES, token_types
from dsmoe_lite.routing.trace import RoutingTrace

TEXT = "def f(x): 12+30=42 日本 🙂 héllo\n"
CONFIG = ModelConfig(
    vocab_size=256,
    d_model=16,
    n_layers=3,
    attention=AttentionConfig(n_heads=2, head_dim=8),
    ffn_width=16,
    moe=MoEConfig(n_routed_experts=6, top_k=2, expert_width=8),
    max_seq_len=16,
    init_std=0.3,
)


def bytes_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def made(**moe) -> Transformer:
    torch.manual_seed(0)
    return Transformer(replace(CONFIG, moe=replace(CONFIG.moe, **moe)))


TOKENIZER = bytes_tokenizer()
T = len(TEXT.encode())
torch.set_num_threads(1)


@pytest.mark.parametrize(
    "moe",
    [{}, {"n_shared_experts": 1}, {"eval_capacity_factor": 1.0}, {"chooser": "expert"},
     {"scoring_func": "sigmoid", "expert_bias": True, "norm_topk_prob": True},
     {"scoring_func": "hash", "top_k": 1}],
    ids=["plain", "shared", "capacity", "expert choice", "bias", "hash"],
)  # fmt: skip
def test_a_trace_equals_the_models_routing(moe):
    model = made(**moe)
    for layer in model.moe_layers:
        if moe.get("expert_bias"):
            layer.router.expert_bias.copy_(torch.linspace(-1, 1, 6))
    trace = RoutingTrace.of(model, TOKENIZER, TEXT, window=7, n_devices=3)
    ids = TOKENIZER.encode(TEXT).ids
    assert trace.token_ids.tolist() == ids
    assert "".join(trace.tokens) == TEXT
    assert trace.device_of.tolist() == [0, 0, 1, 1, 2, 2]
    assert (trace.n_layers, trace.n_experts, trace.n_shared) == (3, 6, moe.get("n_shared_experts", 0))
    model.eval()
    for start in range(0, len(ids), 7):
        tokens = torch.tensor([ids[start : start + 7]])
        with torch.no_grad():
            output = model(tokens)
        for layer, routing in enumerate(output.routings):
            for t, (chosen, gates, kept) in enumerate(zip(routing.topk_ids, routing.gates, routing.kept, strict=True)):
                traced = {
                    int(e): (float(g), bool(k))
                    for e, g, k in zip(trace.topk_ids[layer, start + t], trace.gates[layer, start + t],
                                       trace.kept[layer, start + t], strict=True)
                    if e >= 0
                }  # fmt: skip
                expected = {int(e): (float(g.half()), bool(k)) for e, g, k in zip(chosen, gates, kept, strict=True)
                            if e >= 0}  # fmt: skip
                assert traced == expected
            stored = torch.from_numpy(trace.scores[layer, start : start + 7])
            torch.testing.assert_close(stored, routing.scores.half())
        losses = F.cross_entropy(output.logits[0, :-1], tokens[0, 1:], reduction="none")
        assert np.isnan(trace.loss[start])
        np.testing.assert_allclose(trace.loss[start + 1 : start + 7], losses, rtol=1e-5)


def test_gates_are_in_falling_order_and_loads_add_up():
    trace = RoutingTrace.of(made(top_k=3), TOKENIZER, TEXT)
    assert (np.diff(trace.gates.astype(np.float32), axis=2) <= 0).all()
    for number in range(trace.n_layers):
        layer = trace.layer(number)
        assert int(layer.counts.sum()) == len(trace.tokens) * 3
        assert float(load(layer).mean()) == pytest.approx(1)
        assert drop_rate(layer) == 0


def test_documents_do_not_attend_to_each_other():
    model, documents = made(), [Document("one two", "a"), Document("three", "b")]
    trace = RoutingTrace.of(model, TOKENIZER, documents)
    alone = RoutingTrace.of(model, TOKENIZER, "three")
    assert trace.domain == ("a",) * 7 + ("b",) * 5
    np.testing.assert_array_equal(trace.topk_ids[:, 7:], alone.topk_ids)
    np.testing.assert_array_equal(np.isnan(trace.loss).nonzero()[0], [0, 7])
    assert trace.mean_loss == pytest.approx(np.nanmean(trace.loss))


def test_the_model_stays_in_its_mode():
    model = made().train()
    RoutingTrace.of(model, TOKENIZER, TEXT)
    assert model.training


def test_save_and_load_give_the_same_trace(tmp_path: Path):
    trace = RoutingTrace.of(made(eval_capacity_factor=1.0), TOKENIZER, TEXT + "\0", n_devices=2)
    path = tmp_path / "a folder" / "trace.npz"
    trace.save(path)
    again = RoutingTrace.load(path)
    for field in fields(trace):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(trace, field.name))
        assert type(getattr(again, field.name)) is type(getattr(trace, field.name))
    with np.load(path, allow_pickle=False) as file:  # no pickles anywhere
        assert all(file[name].dtype != object for name in file)


def test_a_trace_stored_with_the_names_of_schema_version_1_loads(tmp_path: Path):
    path = tmp_path / "trace.npz"
    strings = np.frombuffer(b'["a", "b"]', np.uint8)
    np.savez(
        path, schema_version=np.int64(1), tokens=strings, domain=strings, token_type=strings,
        token_ids=np.array([5, 6], np.int32), expert=np.array([[[1, -1], [0, 1]]], np.int16),
        gate=np.array([[[0.5, 0.0], [0.75, 0.25]]], np.float16), kept=np.ones((1, 2, 2), bool),
        scores=np.full((1, 2, 2), 0.5, np.float16), loss=np.array([np.nan, 2.0], np.float32),
        device_of=np.array([0, 1], np.int8), n_shared=np.int64(1), n_devices=np.int64(2),
    )  # fmt: skip
    trace = RoutingTrace.load(path)
    assert trace.topk_ids.tolist() == [[[1, -1], [0, 1]]]
    assert trace.gates.tolist() == [[[0.5, 0.0], [0.75, 0.25]]]
    assert (trace.n_experts, trace.tokens, trace.mean_loss) == (2, ("a", "b"), 2.0)
    trace.save(path)
    with np.load(path) as file:
        assert {"expert", "gate", "topk_ids", "gates"} & set(file) == {"expert", "gate"}


def rewritten(path: Path, **changed) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file}
    for name, value in changed.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = value
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"schema_version": np.int64(2)}, "schema_version = 2: this package reads 1"),
     ({"schema_version": None}, "not a trace, or damaged"),
     ({"gate": None}, "not a trace, or damaged"),
     ({"tokens": np.zeros(3, np.uint8)}, "not a trace, or damaged"),
     ({"gate": np.zeros((1, 2, 3), np.float16)}, r"gate is float16\[1, 2, 3\]: damaged"),
     ({"expert": np.zeros((3, T, 2), np.int64)}, "expert is int64"),
     ({"expert": np.zeros((3, T), np.int16)}, "expert and scores have 2 dimensions"),
     ({"expert": np.full((3, T, 2), 6, np.int16)}, "expert has ids beyond 5"),
     ({"device_of": np.full(6, -1, np.int8)}, "device_of has devices that do not exist"),
     ({"domain": np.frombuffer(b'["a"]', np.uint8)}, "domain has 1 entries"),
     ({"domain": np.frombuffer(b"[" + b"1," * (T - 1) + b"1]", np.uint8)}, "domain has entries that are no strings"),
     ({"gate": np.full((3, T, 2), np.nan, np.float16)}, "gate has values that are negative or not a number"),
     ({"gate": np.full((3, T, 2), -0.5, np.float16)}, "gate has values that are negative or not a number"),
     ({"scores": np.full((3, T, 6), np.nan, np.float16)}, "scores has values that are not a number"),
     ({"expert": np.full((3, T, 2), 4, np.int16)}, "expert has an id twice for one token"),
     ({"expert": np.zeros((3, T, 2), np.int32)}, "expert is int32"),
     ({"n_devices": np.int64(10**9)}, "n_devices = 1000000000 is not from 1 to 6"),
     ({"n_devices": np.int64(7)}, "n_devices = 7 is not from 1 to 6"),
     ({"n_devices": np.int64(0), "device_of": np.zeros(6, np.int8)}, "n_devices = 0 is not from 1 to 6"),
     ({"n_devices": np.float64(np.inf)}, "not a trace, or damaged"),
     ({"n_shared": np.int64(-1)}, "n_shared = -1: damaged")],
)  # fmt: skip
def test_other_versions_and_damage_are_refused_in_one_line(tmp_path, changed, message):
    path = tmp_path / "trace.npz"
    RoutingTrace.of(made(), TOKENIZER, TEXT).save(path)
    rewritten(path, **changed)
    with pytest.raises(InputError, match=message) as error:
        RoutingTrace.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("n_experts", "dtype"), [(32_768, np.int16), (32_769, np.int32), (40_000, np.int32)])
def test_ids_of_very_many_experts_do_not_wrap(tmp_path, n_experts, dtype):
    moe = MoEConfig(n_routed_experts=n_experts, top_k=2, expert_width=1)
    config = replace(CONFIG, n_layers=1, d_model=4, moe=moe, attention=AttentionConfig(n_heads=1, head_dim=4))
    model = Transformer(config)
    for layer in model.moe_layers:
        layer.router.weight.data[:-3] = 0  # choose among the last three, and the first for ties
    trace = RoutingTrace.of(model, TOKENIZER, TEXT)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([trace.token_ids[:16].tolist()])).routings[0].topk_ids
    assert trace.topk_ids.dtype == dtype
    assert sorted(trace.topk_ids[0, 0].tolist()) == sorted(expected[0].tolist())
    assert trace.topk_ids.max() >= n_experts - 3
    assert int(trace.layer(0).counts.sum()) == 2 * T
    trace.save(tmp_path / "trace.npz")
    again = RoutingTrace.load(tmp_path / "trace.npz")
    assert again.topk_ids.dtype == dtype
    np.testing.assert_array_equal(again.topk_ids, trace.topk_ids)


def test_no_flipped_bit_gives_anything_but_a_trace_or_an_input_error(tmp_path):
    path = tmp_path / "trace.npz"
    RoutingTrace.of(made(), TOKENIZER, TEXT).save(path)
    content = path.read_bytes()
    draw = np.random.default_rng(0)
    for at in draw.integers(len(content), size=300):
        path.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.integers(8))]) + content[at + 1 :])
        with suppress(InputError):
            RoutingTrace.load(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"no zip at all"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "trace.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"trace\.npz: not a trace, or damaged"):
        RoutingTrace.load(path)
    with pytest.raises(InputError, match=r"none\.npz: no such trace"):
        RoutingTrace.load(tmp_path / "none.npz")


def test_bad_input():
    of = RoutingTrace.of
    dense = Transformer(replace(CONFIG, moe=None))
    small = Transformer(replace(CONFIG, vocab_size=100))
    for call, message in (
        (lambda: of(made(), TOKENIZER, ""), r"text = '': is empty"),
        (lambda: of(made(), TOKENIZER, []), r"text = '': is empty"),
        (lambda: of(made(), TOKENIZER, "x" * (module.MAX_CHARACTERS + 1)), r"text = 1,000,001 characters"),
        (lambda: of(made(), TOKENIZER, "\ud800"), r"text: has half a character"),
        (lambda: of(dense, TOKENIZER, "x"), r"model = 'dense': has no MoE layers"),
        (lambda: of(small, TOKENIZER, "x"), r"tokenizer = 256: has more ids than the model's vocab_size = 100"),
        (lambda: of(made(), TOKENIZER, "x", window=17), r"window = 17: must be"),
        (lambda: of(made(), TOKENIZER, "x", n_devices=7), r"n_devices = 7: must be"),
        (lambda: of(made(), TOKENIZER, "x").layer(3), r"layer = 3: must be"),
    ):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_hundred_thousand_characters():
    text = "ab 12, " * 14_286
    torch.manual_seed(0)
    trace = RoutingTrace.of(Transformer(replace(CONFIG, n_layers=1, max_seq_len=2048)), TOKENIZER, text)
    assert len(trace.tokens) == len(text)
    assert trace.topk_ids.shape == (1, len(text), 2)
    assert np.isnan(trace.loss).sum() == -(-len(text) // 2048)


def test_token_types():
    pieces = ["def", " f", "(", "x", "):", " ", "1", "2", " Nor", "vania", "日", "🙂", "", "", "\n", "a"]
    types = token_types(pieces)
    assert types == (
        "word", "word", "punctuation", "word", "punctuation", "space", "digit", "digit", "word", "word part",
        "word part", "punctuation", "byte", "byte", "space", "word",
    )  # fmt: skip
    assert set(types) == set(TYPES)
