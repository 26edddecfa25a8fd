"""The model in the page: `engine.js` in headless Chromium computes what the package computes with the same weights."""

import base64
import json
import random
import unicodedata
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsmoe_lite import MoEConfig, Transformer, generate, load_model, preset
from dsmoe_lite.checkpoint import read_metadata
from dsmoe_lite.common.paths import DATA
from dsmoe_lite.config import AttentionConfig, MLAConfig
from dsmoe_lite.data.tokenizer import read_tokenizer
from dsmoe_lite.data.world import World
from dsmoe_lite.routing.interventions import silence, switch_off
from dsmoe_lite.routing.trace import tokenize
from dsmoe_lite.viz.packed_model import ENGINE, pack

GSHARD, DEEPSEEKMOE = (DATA / "models" / f"world-{name}.safetensors" for name in ("gshard", "deepseekmoe"))
TOKENIZER = read_tokenizer(read_metadata(GSHARD)["tokenizer"])
ODD = [
    "a",
    " ",
    "\n\t ",
    "😀 and 👩‍👩‍👧",
    "汉字测试",
    "<|end|>",
    "1 22 333",
    "don't we'll 'tis",
    "é̈",
    "\u200b\u00a0\u0085\ufeff",
    "x" * 300,
]
MLA = MLAConfig(n_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=8)
HARD = {
    "sigmoid, bias, groups": MoEConfig(
        n_routed_experts=12, top_k=3, expert_width=16, n_shared_experts=1, scoring_func="sigmoid", expert_bias=True,
        n_group=4, topk_group=2, group_score="top2", norm_topk_prob=True, routed_scaling_factor=2.5,
    ),
    "softmax, capacity": MoEConfig(n_routed_experts=6, top_k=2, expert_width=16, eval_capacity_factor=1.1),
    "best group": MoEConfig(
        n_routed_experts=8, top_k=2, expert_width=16, n_group=4, topk_group=1, routed_scaling_factor=4.0
    ),
}  # fmt: skip
RUN = """([ids, off, name]) => {
    const model = window.models[name];
    const { logits, routings } = model.forward(ids, { off: new Set(off) });
    const coded = (list) => {
        const bytes = new Uint8Array(Float32Array.from(list).buffer);
        let letters = "";
        for (let i = 0; i < bytes.length; i += 8192) letters += String.fromCharCode(...bytes.subarray(i, i + 8192));
        return btoa(letters);
    };
    return { logits: coded(logits), losses: coded(model.losses(ids, logits)),
             routings: routings.map((r) => ["ids", "gates", "kept"].map((part) => coded(r[part]))) };
}"""


@pytest.fixture(scope="module")
def page(browser):
    context = browser.new_context()
    page = context.new_page()
    page.add_script_tag(content=ENGINE.read_text())
    page.evaluate("window.models = {}")
    yield page
    context.close()


def put(page, name, model):
    """Load a model into the page as `name`; its weights become those that the page has, rounded to float16."""
    packed = pack(model, TOKENIZER)
    page.evaluate("async ([name, packed]) => { window.models[name] = await dsmoeEngine.read(packed); }", [name, packed])
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(value.half())
    return model.eval()


@pytest.fixture(scope="module")
def shipped(page):
    return {path.stem: put(page, path.stem, load_model(path)) for path in (GSHARD, DEEPSEEKMOE)}


def texts(number):
    """Texts of every kind: of the world, half of one and half of another, and odd ones."""
    draw, world = random.Random(number), World()
    documents = [document.text for document, _ in zip(world.documents("heldout"), range(60), strict=False)]
    made = [draw.choice(documents)[: draw.randint(1, 300)] for _ in range(number // 2)]
    made += [draw.choice(documents)[-40:] + draw.choice(documents)[:60] for _ in range(number // 4)]
    return (ODD + made + [question.prompt for question in world.questions("head")])[:number]


@torch.no_grad()
def assert_equal(page, name, model, ids, off=(), *, of=None):
    """`of`: the package's model with these experts off, else `model`."""
    output = (of or model)(torch.tensor([ids]))
    found = page.evaluate(RUN, [ids, list(off), name])
    for routing, mine in zip(output.routings, found["routings"], strict=True):
        ids_found, gates, kept = map(decoded, mine)
        assert torch.equal(ids_found.long(), routing.topk_ids.flatten())
        assert torch.equal(kept.bool(), routing.kept.flatten())
        torch.testing.assert_close(gates, routing.gates.flatten(), atol=2e-5, rtol=2e-5)
    logits = decoded(found["logits"]).view_as(output.logits[0])
    torch.testing.assert_close(logits, output.logits[0], atol=1e-3, rtol=0)
    if len(ids) > 1:
        losses = F.cross_entropy(output.logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        torch.testing.assert_close(decoded(found["losses"])[1:], losses, atol=1e-3, rtol=0)


def decoded(coded):
    return torch.frombuffer(bytearray(base64.b64decode(coded)), dtype=torch.float32)


@pytest.mark.parametrize("name", [GSHARD.stem, DEEPSEEKMOE.stem])
def test_texts_of_every_kind_get_the_packages_experts_and_losses(page, shipped, name):
    for text in texts(200):
        ids = [token for token, _ in tokenize(TOKENIZER, text)][:128]
        assert_equal(page, name, shipped[name], ids)


@pytest.mark.parametrize("name", [GSHARD.stem, DEEPSEEKMOE.stem])
def test_every_expert_can_be_switched_off(page, shipped, name):
    model = shipped[name]
    ids = TOKENIZER.encode("Which tool does Ridi Lava have? muda. Which pet does Ridi Lava have?").ids
    for layer in range(2):
        for e in range(model.config.moe.n_routed_experts):
            assert_equal(page, name, model, ids, [f"{layer} {e}"], of=switch_off(model, {layer: [e]}))
    if model.config.moe.n_shared_experts:
        assert_equal(page, name, model, ids, ["0 shared", "1 shared"], of=silence(model, shared=True))


@pytest.mark.parametrize("name", HARD)
def test_other_routers_of_the_package(page, name):
    torch.manual_seed(0)
    attention = AttentionConfig(n_heads=4, head_dim=8, n_kv_heads=2)
    config = replace(preset("course-dense"), vocab_size=1024, d_model=24, attention=attention, ffn_width=40,
                     moe=HARD[name], n_layers=3, n_dense_layers=1, init_std=0.3)  # fmt: skip
    model = Transformer(config)
    for layer in model.moe_layers:
        if layer.router.config.expert_bias:
            layer.router.expert_bias.normal_(std=0.2)
    put(page, name, model)
    for text in texts(12):
        assert_equal(page, name, model, [token for token, _ in tokenize(TOKENIZER, text)][:100])


def test_a_dense_model_runs_too(page):
    torch.manual_seed(0)
    model = put(page, "dense", Transformer(replace(preset("course-dense"), vocab_size=1024, tie_embeddings=True)))
    assert_equal(page, "dense", model, TOKENIZER.encode("no experts").ids)


@pytest.mark.parametrize("name", [GSHARD.stem, DEEPSEEKMOE.stem])
def test_greedy_generation_is_equal(page, shipped, name):
    prompt = TOKENIZER.encode("As song Ridi Labu has").ids
    (expected,) = generate.generate(shipped[name], [prompt], 64)
    took = "([ids, name]) => [...window.models[name].generate(ids, 64)].map((step) => step.id)"
    assert page.evaluate(took, [prompt, name]) == list(expected)


def test_sampled_tokens_follow_the_probabilities(page, shipped):
    ids = TOKENIZER.encode("Which tool does").ids
    counts = page.evaluate(
        """([ids, name]) => {
            const model = window.models[name], counts = {};
            const p = model.probabilities(ids, { temperature: 2 });
            for (let i = 0; i < 200; i += 1) { // an even grid of draws: each token as often as its probability says
                const [{ id }] = model.generate(ids, 1, { temperature: 2, random: () => (i + 0.5) / 200 });
                counts[id] = (counts[id] || 0) + 1;
            }
            return Math.max(...Object.entries(counts).map(([id, n]) => Math.abs(n / 200 - p[id])));
        }""",
        [ids, DEEPSEEKMOE.stem],
    )
    assert counts <= 0.011


def strings(number):
    """Strings of characters of every kind, more of those near letters, digits and spaces."""
    draw = random.Random(0)
    pool = [chr(c) for c in range(0x3000) if unicodedata.category(chr(c)) != "Cs"] + list("汉字😀🎉 \n\t'") * 20
    common = list("abcdefghijklmnop  '.,?0123456789\n")
    lengths = [draw.randint(1, 24) for _ in range(number)]
    return ["".join(draw.choice(common if draw.random() < 0.6 else pool) for _ in range(n)) for n in lengths]


def test_the_tokenizer_is_equal_on_ten_thousand_strings_and_decodes_them(page, shipped):
    made = strings(10_000) + ODD
    found = page.evaluate(
        """([texts, name]) => texts.map((text) => {
            const { tokenizer } = window.models[name];
            const { ids, pieces } = tokenizer.encode(text);
            return [ids, pieces, tokenizer.decode(ids)];
        })""",
        [made, GSHARD.stem],
    )
    for text, (ids, pieces, decoded) in zip(made, found, strict=True):
        assert list(zip(ids, pieces, strict=True)) == tokenize(TOKENIZER, text), text
        assert decoded == text


def test_bad_input_is_refused_in_one_line(page, shipped):
    call = """([code]) => { try { new Function("model", code)(window.models["world-gshard"]); return ""; }
                            catch (error) { return error.message; } }"""
    for code, message in (
        ('model.tokenizer.encode("a\\ud800")', "half a character"),
        ("model.forward(new Array(257).fill(1))", "at most 256"),
        ('model.forward([1], { off: new Set(Array.from({ length: 15 }, (_, e) => "0 " + e)) })', "Experts left: 1."),
    ):
        assert message in page.evaluate(call, [code])
    v4 = preset("course-v4")
    for config, message in (
        (replace(preset("course-dense"), attention=MLA), "latent attention"),
        (v4, "hash routing"),
        (replace(v4, n_hash_layers=0), "the experts of DeepSeek-V4"),
        (preset("course-hash"), "hash routing"),
    ):
        with pytest.raises(Exception, match=f"cannot run a model with {message}"):
            put(page, "other", Transformer(replace(config, vocab_size=1024)))


def test_packing_the_same_model_twice_gives_the_same_bytes():
    first, second = (json.dumps(pack(load_model(GSHARD), TOKENIZER)) for _ in range(2))
    assert first == second
    assert len(first) < 2_600_000
