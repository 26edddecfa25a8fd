"""Random configs, jobs and files from fixed seeds: each works, or is refused in one line; nothing else happens.

`make test-all` runs all of them, `make test` the first of each kind.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from dsmoe_lite.checkpoint import load_model, load_training, save_model, save_training
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import AttentionConfig, ModelConfig, MoEConfig, from_dict, to_dict
from dsmoe_lite.generate import generate
from dsmoe_lite.layers.cache import Cache
from dsmoe_lite.model import Transformer
from dsmoe_lite.routing.trace import RoutingTrace
from dsmoe_lite.training.job import read_job

MODELS, JOBS, FILES = 2000, 500, 300
CHUNK = 100  # cases per test

NASTY = [0, -1, 1, 2, 3, 1.5, 10**9, 2**63, 10**40, True, None, "", "3", "softmax", [], [1], {}, {"a": 1}, float("nan"),
         float("inf"), -0.0, 1e-300]  # fmt: skip


def chunks(total: int) -> list[Any]:
    """The first cases of each chunk; all but the first are for `make test-all`."""
    return [pytest.param(first, marks=[pytest.mark.slow] if first else []) for first in range(0, total, CHUNK)]


@contextmanager
def refused() -> Iterator[list[str]]:
    """Allow an InputError or RunError of one short line, which is added to the list."""
    said: list[str] = []
    try:
        yield said
    except (InputError, RunError) as error:
        said.append(str(error))
        assert "\n" not in said[0]
        assert 0 < len(said[0]) < 1500


# Model configs


def random_attention(draw: random.Random) -> dict[str, Any]:
    yarn = {"factor": draw.choice([1.0, 2.0, 4.0]), "original_max_len": draw.choice([4, 8, 16])}
    common = {"rope_theta": draw.choice([100.0, 10_000.0]), "yarn": draw.choice([None, None, yarn])}
    if draw.random() < 0.4:
        return common | {
            "n_heads": draw.choice([1, 2, 3]),
            "qk_nope_head_dim": draw.choice([1, 4, 6]),
            "qk_rope_head_dim": draw.choice([2, 4]),
            "v_head_dim": draw.choice([1, 4, 10]),
            "kv_lora_rank": draw.choice([1, 5, 8]),
            "q_lora_rank": draw.choice([None, 3]),
        }
    return common | {
        "n_heads": draw.choice([1, 2, 4]),
        "head_dim": draw.choice([2, 4, 8]),
        "n_kv_heads": draw.choice([None, 1, 2]),
        "window": draw.choice([None, None, 1, 3, 40]),
    }


def random_moe(draw: random.Random) -> dict[str, Any]:
    E = draw.choice([1, 2, 4, 6, 8])
    return {
        "n_routed_experts": E,
        "top_k": draw.choice([1, 1, 2, 3]),
        "expert_width": draw.choice([1, 4, 6]),
        "n_shared_experts": draw.choice([0, 0, 1, 2]),
        "scoring_func": draw.choice(["softmax", "softmax", "sigmoid", "hash"]),
        "chooser": draw.choice(["token", "token", "token", "expert"]),
        "noisy_gating": draw.random() < 0.2,
        "expert_bias": draw.random() < 0.3,
        "n_group": draw.choice([1, 1, 2, E]),
        "topk_group": draw.choice([1, 1, 2]),
        "group_score": draw.choice(["max", "max", "top2"]),
        "norm_topk_prob": draw.random() < 0.4,
        "routed_scaling_factor": draw.choice([1.0, 2.5]),
        "second_choice": draw.choice(["all", "all", "all", "random"]),
        "capacity_factor": draw.choice([None, None, 0.5, 2.0]),
        "eval_capacity_factor": draw.choice([None, None, None, 1.0]),
        "group_capacity_factor": draw.choice([None, None, None, 1.0]),
        "routing_groups": draw.choice([1, 1, 1, 2]),
        "backend": draw.choice(["loop", "padded", "grouped", "auto"]),
    }


def random_config(draw: random.Random) -> dict[str, Any]:
    """The fields of a small model; in about one case of four, one of them has a nasty value."""
    values: dict[str, Any] = {
        "vocab_size": draw.choice([8, 17, 40]),
        "d_model": draw.choice([4, 8, 12]),
        "n_layers": draw.choice([1, 2, 3]),
        "attention": random_attention(draw),
        "ffn_width": draw.choice([1, 8]),
        "moe": draw.choice([None, random_moe(draw), random_moe(draw), random_moe(draw)]),
        "n_dense_layers": draw.choice([0, 0, 1]),
        "interleave": draw.choice([1, 1, 2]),
        "max_seq_len": draw.choice([16, 24]),
        "tie_embeddings": draw.random() < 0.3,
        "init_std": 0.3,
    }
    if draw.random() < 0.25:
        parts = [part for part in (values, values["attention"], values["moe"]) if part]
        part = draw.choice(parts)
        name = draw.choice([*part, "n_expert"])
        part[name] = draw.choice(NASTY)
    return values


def too_large(config: ModelConfig) -> bool:
    """Whether a nasty value made a model that is valid, but not small."""
    numbers = [config.vocab_size, config.d_model, config.ffn_width, config.max_seq_len, config.n_layers,
               *vars(config.attention).values(), *(vars(config.moe).values() if config.moe else ())]  # fmt: skip
    return any(isinstance(number, int) and number > 1000 for number in numbers)


@torch.no_grad()
def works(config: ModelConfig, path: Path, seed: int) -> None:
    """Build, save, load; decode with a cache as without one, in float64."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 7))
    save_model(path, model)
    loaded = load_model(path)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert to_dict(loaded.config) == to_dict(config)
    independent = config.moe is None or config.moe.routes_alone
    if config.moe is not None and config.moe.backend == "grouped":
        return  # has no float64
    model = model.double()
    whole = model(tokens).logits
    if independent:
        cache = Cache(config, 2)
        parts = [model(part, cache).logits for part in tokens.split([3, 1, 1, 2], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-7, atol=1e-9)
        cached, plain = (generate(model, tokens, 4, use_cache=use) for use in (True, False))
        assert cached == plain
    else:
        assert len(generate(model, tokens, 2)) == 2


@pytest.mark.parametrize("first", chunks(MODELS))
def test_a_random_model_config_works_or_is_refused(first: int, tmp_path: Path) -> None:
    path, worked, said_no = tmp_path / "model.safetensors", 0, 0
    for number in range(first, first + CHUNK):
        values = random_config(random.Random(number))
        with refused() as said:
            config = from_dict(ModelConfig, values)
            if not too_large(config):
                works(config, path, number)
                worked += 1
        said_no += len(said)
    assert worked > CHUNK / 10
    assert said_no > CHUNK / 10


# Jobs

JOB = """model:
  vocab_size: 300
  d_model: 16
  n_layers: 2
  attention: {n_heads: 2, head_dim: 8}
  ffn_width: 24
  moe:
    n_routed_experts: 8
    top_k: 2
    expert_width: 8
    n_shared_experts: 1
  max_seq_len: 64
train:
  steps: 80
  batch_size: 4
  seq_len: 32
  lr: 3e-3
  balance: {expert: 0.01}
  seed: 1
corpus:
  kind: world
  world: {n_documents: 200, n_heldout: 40, shares: [1, 0, 0, 0, 0]}
masked: [0.25]
active: [1, 2]
vocab_size: 400
device: cpu
"""
TOKENS = ["0", "-1", "1e400", ".nan", "010", "yes", "~", "[]", "{}", "[1, 2]", "{a: b}", "*x", "&x 1", "!!set {a}", "'",
          '"', ": ", "- ", "\t", "# ", "|", ">", "%YAML 2.0", "---", "...", "<<: 1", "2001-01-01", "9" * 30, "é",
          "\u2028", "\x07"]  # fmt: skip


def mutated(text: str, draw: random.Random) -> str:
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        lines = text.splitlines(keepends=True)
        at, other = draw.randrange(len(lines)), draw.randrange(len(lines))
        kind = draw.randrange(7)
        if kind == 0:
            lines.insert(other, lines[at])
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            name, colon, _ = lines[at].partition(": ")
            lines[at] = f"{name}{colon}{draw.choice(TOKENS)}\n"
        elif kind == 4:
            place = draw.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + draw.choice(TOKENS) + lines[at][place:]
        elif kind == 5:
            place = draw.randrange(len(lines[at]))
            lines[at] = lines[at][:place] + lines[at][place + 1 :]
        else:
            lines[at] = " " * draw.randrange(4) + lines[at].lstrip()
        text = "".join(lines) or "\n"
    return text


@pytest.mark.parametrize("first", chunks(JOBS))
def test_a_mutated_job_is_read_or_refused(first: int, tmp_path: Path) -> None:
    path, said_no = tmp_path / "job.yaml", 0
    for number in range(first, first + CHUNK):
        path.write_text(mutated(JOB, random.Random(number)), encoding="utf-8")
        with refused() as said:
            read_job(path)
        assert all(str(path) in line for line in said)
        said_no += len(said)
    assert CHUNK / 4 < said_no < CHUNK


# Files

SMALL = ModelConfig(
    vocab_size=17,
    d_model=8,
    n_layers=2,
    attention=AttentionConfig(n_heads=2, head_dim=4),
    ffn_width=8,
    moe=MoEConfig(n_routed_experts=4, top_k=2, expert_width=4),
    max_seq_len=16,
)


def stepped() -> tuple[Transformer, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Transformer(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.arange(12).view(2, 6)).logits.square().mean().backward()
    optimizer.step()
    return model, optimizer


def use_model(path: Path) -> None:
    generate(load_model(path), [[1, 2, 3]], 3)


def use_training(path: Path) -> None:
    model, optimizer = stepped()
    load_training(path, model, optimizer)
    optimizer.step()


def use_trace(path: Path) -> None:
    trace = RoutingTrace.load(path)
    for layer in range(trace.n_layers):
        assert int(trace.layer(layer).counts.sum()) <= len(trace.tokens) * trace.top_k


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Cut, changed, doubled, or, in a safetensors file, with another header."""
    kind = draw.randrange(6)
    at = draw.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + draw.randbytes(draw.choice([1, 8, 100])) + content[at:]
    if kind == 3:
        return content[:at] + content[at + draw.choice([1, 8, 100]) :]
    length = struct.unpack("<Q", content[:8])[0]
    if not 8 < length < len(content):
        return content[at:] + content[:at]
    header = json.loads(content[8 : 8 + length])
    facts = header["__metadata__"]
    if kind == 4:
        name = draw.choice(list(facts))
        facts[name] = draw.choice(["null", "3", "{}", "[]", "", "{", '"x"', facts[name].replace("1", "7"), "NaN"])
    else:
        entry = header[draw.choice([name for name in header if name != "__metadata__"])]
        entry[draw.choice(list(entry))] = draw.choice(["F32", "BF16", [0, 4], [1, 1], [], 3, None])
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, Callable[[Path], None]]]:
    """A model, a training checkpoint and a trace, each with what reads it."""
    folder = tmp_path_factory.mktemp("files")
    model, optimizer = stepped()
    save_model(folder / "model", model)
    save_training(folder / "training", model, optimizer, {"step": 1})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefghijklmnop?")}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    RoutingTrace.of(model.eval(), tokenizer, "a b c d e f g h").save(folder / "trace")
    uses = {"model": use_model, "training": use_training, "trace": use_trace}
    return [((folder / name).read_bytes(), use) for name, use in uses.items()]


@pytest.mark.parametrize("first", chunks(FILES))
def test_a_damaged_file_is_read_or_refused(
    first: int, tmp_path: Path, sources: list[tuple[bytes, Callable[[Path], None]]]
) -> None:
    path, said_no = tmp_path / "file", 0
    for number in range(first, first + CHUNK):
        draw = random.Random(number)
        content, use = sources[number % len(sources)]
        path.write_bytes(damaged(content, draw))
        with refused() as said:
            use(path)
        said_no += len(said)
    assert said_no > CHUNK / 4
