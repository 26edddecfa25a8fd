"""Training: exact resume after kills, one owner a folder, bad input in one line, interrupts that keep the model."""

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from dsmoe_lite.checkpoint import load_model, load_training, read_tensors, save_model
from dsmoe_lite.common.errors import InputError, RunError
from dsmoe_lite.config import MoEConfig, to_dict
from dsmoe_lite.data.batches import Batch, Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import Question, World, WorldConfig
from dsmoe_lite.evaluate import heldout_loss, recall
from dsmoe_lite.layers import balance
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.interrupts import stop_requested
from dsmoe_lite.training.objective import BALANCE_LOSSES, balance_terms
from dsmoe_lite.training.optimizer import learning_rate, make_optimizer
from dsmoe_lite.training.record import Run, run_record
from dsmoe_lite.training.train import train

WORLD = WorldConfig(n_entities=40, n_control=8, n_head=8, n_tail=8, n_documents=400, n_heldout=100)
CONFIG = TrainConfig(steps=12, batch_size=4, seq_len=32, warmup_steps=3, checkpoint_every=1)
SMALL = replace(preset("course-gshard"), d_model=32, max_seq_len=64)

# One process imports torch; each line "folder<TAB>steps" makes it fork a child that trains there. It prints the child's
# id, and its exit status once it has ended.
NURSERY = """
import os, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train import CONFIG, make
from dsmoe_lite.training.train import train
train(*make(), replace(CONFIG, steps=1))  # loads what torch loads late
model, batches = make()
for line in sys.stdin:
    folder, steps = line.rstrip().split("\\t")
    child = os.fork()
    if child == 0:
        train(model, batches, replace(CONFIG, steps=int(steps)), folder=Path(folder))
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Nursery:
    """Training processes that start at once."""

    def __init__(self) -> None:
        code = NURSERY.format(tests=str(Path(__file__).parent))
        quiet = {**os.environ, "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet
        )

    def start(self, folder: Path, steps: int) -> int:
        """Train in `folder`; return the process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{folder}\t{steps}\n")
        self.process.stdin.flush()
        return int(self._line())

    def status(self) -> int:
        """Wait for the child's end: its exit status, or minus the signal that ended it."""
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


@cache
def small_world() -> tuple[World, Tokenizer]:
    world = World(WORLD)
    return world, load_tokenizer(world, 512)


def make(seed: int = 0) -> tuple[Transformer, Batches]:
    world, tokenizer = small_world()
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, vocab_size=tokenizer.get_vocab_size()))
    return model, Batches(world, tokenizer, CONFIG.batch_size, CONFIG.seq_len)


def wait_for_a_new(checkpoint: Path) -> None:
    before, deadline = stamp_of(checkpoint), time.monotonic() + 60
    while stamp_of(checkpoint) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert stamp_of(checkpoint) != before


def stamp_of(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_training_lowers_the_loss_and_reports_balance() -> None:
    model, batches = make()
    run = train(model, batches, replace(CONFIG, steps=60, lr=1e-2))
    assert run.losses[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.2)
    assert sum(run.losses[-10:]) / 10 < run.losses[0] - 1
    assert [entry["step"] for entry in run.routing] == [0, 20, 40]
    assert all(0 <= entry["drop_rate"] < 1 and entry["max_vio"] >= 0 for entry in run.routing)
    assert run.tokens == 60 * 4 * 32


def test_ten_kills_at_random_steps_change_no_loss(tmp_path: Path, nursery: Nursery) -> None:
    steps = 40
    model, batches = make()
    unbroken = train(model, batches, replace(CONFIG, steps=steps)).losses
    draw, kills, runs = random.Random(7), 0, 0
    while kills < 10:  # a run that reaches its end before the tenth kill is compared, and another one begins
        folder = tmp_path / f"run {runs}"
        while True:
            child = nursery.start(folder, steps)
            if kills < 10:
                before = stamp_of(folder / "checkpoint.safetensors")
                while running(child) and stamp_of(folder / "checkpoint.safetensors") == before:
                    time.sleep(0.001)
                time.sleep(draw.random() * 0.04)
                if running(child):
                    os.kill(child, signal.SIGKILL)
            status = nursery.status()
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
            kills += 1
        _, facts = read_tensors(folder / "checkpoint.safetensors")
        assert facts["training"]["losses"] == unbroken
        runs += 1


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_resume_from_every_step_equals_the_unbroken_run(tmp_path: Path) -> None:
    model, batches = make()
    unbroken = train(model, batches, CONFIG)
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    for stop in range(1, CONFIG.steps):
        folder = tmp_path / str(stop)
        model, batches = make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsmoe_lite.training.processes.save_training", _save_then_die_at(stop))
            with pytest.raises(KeyboardInterrupt):
                train(model, batches, CONFIG, folder=folder)
        _, before = read_tensors(folder / "checkpoint.safetensors")
        model, batches = make(seed=99)  # weights and random state come from the checkpoint
        resumed = train(model, batches, CONFIG, folder=folder)
        assert resumed.losses == unbroken.losses
        assert resumed.routing == unbroken.routing
        assert resumed.tokens == unbroken.tokens
        assert resumed.seconds > before["training"]["seconds"] > 0  # time adds up over the parts
        assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())


def _save_then_die_at(stop: int):
    from dsmoe_lite.checkpoint import save_training

    def save(path, model, optimizer, state):
        save_training(path, model, optimizer, state)
        if len(state["losses"]) == stop:
            raise KeyboardInterrupt

    return save


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    from filelock import FileLock

    model, batches = make()
    with FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process is training in this folder"):
        train(model, batches, CONFIG, folder=tmp_path)


def test_two_real_processes_one_is_refused(tmp_path: Path, nursery: Nursery) -> None:
    child = nursery.start(tmp_path, 1_000_000)
    wait_for_a_new(tmp_path / "checkpoint.safetensors")
    model, batches = make()
    try:
        with pytest.raises(RunError, match="another process"):
            train(model, batches, replace(CONFIG, steps=1_000_000), folder=tmp_path)
        wait_for_a_new(tmp_path / "checkpoint.safetensors")  # the first goes on
    finally:
        os.kill(child, signal.SIGKILL)
        assert nursery.status() == -signal.SIGKILL


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    model, batches = make()
    train(model, batches, CONFIG, folder=tmp_path)
    model, batches = make()
    with pytest.raises(InputError, match=r"train.lr = 0.5: .* holds a run with 0.003"):
        train(model, batches, replace(CONFIG, lr=0.5), folder=tmp_path)
    other = Batches(World(replace(WORLD, seed=1)), small_world()[1], CONFIG.batch_size, CONFIG.seq_len)
    with pytest.raises(InputError, match=r"data.corpus = "):
        train(model, other, CONFIG, folder=tmp_path)
    small, batches = make()
    with pytest.raises(InputError, match=r"model.ffn_width = 96"):
        train(Transformer(replace(small.config, ffn_width=96)), batches, CONFIG, folder=tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 200, -1])
def test_a_truncated_checkpoint_is_one_line(tmp_path: Path, keep: int) -> None:
    model, _ = make()
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged checkpoint") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_model_round_trip_and_wrong_kind(tmp_path: Path) -> None:
    model, _ = make()
    save_model(tmp_path / "m.safetensors", model, note="x")
    again = load_model(tmp_path / "m.safetensors")
    assert to_dict(again.config) == to_dict(model.config)
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(InputError, match="is no training checkpoint"):
        load_training(tmp_path / "m.safetensors", model, make_optimizer(model, CONFIG))
    with pytest.raises(InputError, match="no such checkpoint"):
        load_model(tmp_path / "absent.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full: a disk that is always full")
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make()
    path = tmp_path / "m.safetensors"
    save_model(path, model)
    before = path.read_bytes()

    def full(tensors, aside, metadata):
        with open("/dev/full", "wb", buffering=0) as disk:
            disk.write(b"x" * 4096)

    monkeypatch.setattr("dsmoe_lite.checkpoint.save_file", full)
    with pytest.raises(RunError, match=r"m\.safetensors: not written \(No space left on device\)"):
        save_model(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_interrupt_ends_after_the_step_and_keeps_the_model(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    class Interrupting(Batches):
        left = 5

        def __next__(self) -> Batch:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    model, _ = make()
    start = model.head.weight.clone()
    batches = Interrupting(*small_world(), CONFIG.batch_size, CONFIG.seq_len)
    run = train(model, batches, replace(CONFIG, steps=100_000, checkpoint_every=0), folder=tmp_path)
    assert run.steps_done == 5
    assert not torch.equal(model.head.weight, start)
    said = capsys.readouterr().out
    assert said == f"Stopped after step 5 of 100000: run it again to continue from {tmp_path}.\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, facts = read_tensors(tmp_path / "checkpoint.safetensors")
    assert facts["training"]["losses"] == run.losses


def test_a_second_interrupt_does_not_wait() -> None:
    with stop_requested() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nan_is_reported_with_the_remedy() -> None:
    model, batches = make()
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"loss = nan at step 0: lower lr"):
        train(model, batches, CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", float("nan")),
        ("lr", 0.0),
        ("lr", -1),
        ("steps", 0),
        ("steps", 1.5),
        ("balance", {"swich": 0.1}),
        ("seed", -1),
    ],
)
def test_a_train_config_that_cannot_work_is_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{field} = "):
        replace(CONFIG, **{field: value})


def test_learning_rate_warms_up_and_ends_at_its_share() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, final_lr_share=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[99] < 0.101
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_gradient_accumulation_equals_one_large_batch() -> None:
    config = replace(CONFIG, balance={}, steps=5)
    dense = replace(preset("course-dense"), d_model=32, max_seq_len=64)

    def losses(batch_size: int, accum: int) -> list[float]:
        world, tokenizer = small_world()
        torch.manual_seed(0)
        model = Transformer(replace(dense, vocab_size=tokenizer.get_vocab_size())).double()
        batches = Batches(world, tokenizer, batch_size, CONFIG.seq_len)
        return train(model, batches, replace(config, batch_size=batch_size, grad_accum=accum)).losses

    assert losses(2, 4) == pytest.approx(losses(8, 1), rel=1e-9)


@pytest.mark.parametrize("balance_loss", ["switch", "gshard"])
def test_four_steps_written_out(balance_loss: str) -> None:
    """AdamW, warm-up, clipping, accumulation and the balance losses, in float64 from their equations."""
    config = TrainConfig(
        steps=4, batch_size=2, seq_len=16, grad_accum=2, lr=0.01, warmup_steps=2, weight_decay=0.3, beta1=0.8,
        beta2=0.9, grad_clip=0.5, balance={balance_loss: 0.7, "z": 0.05},
    )  # fmt: skip
    rates = [0.005, 0.01, 0.01, 0.01 * (0.1 + 0.9 / 2)]  # half of the way up, the top, the cosine's start and middle
    world, tokenizer = small_world()
    moe = replace(SMALL.moe, second_choice="all", capacity_factor=0.8)
    torch.manual_seed(0)
    model = Transformer(replace(SMALL, moe=moe, vocab_size=tokenizer.get_vocab_size())).double()
    mine = copy.deepcopy(model).train()
    run = train(model, Batches(world, tokenizer, 2, 16), config)

    batches, clipped = Batches(world, tokenizer, 2, 16), []
    first, second = ([torch.zeros_like(weight) for weight in mine.parameters()] for _ in range(2))
    for step, rate in enumerate(rates):
        gradients = [torch.zeros_like(weight) for weight in mine.parameters()]
        for _ in range(2):
            tokens = next(batches).tokens
            output = mine(tokens[:, :-1])
            picked = output.logits.log_softmax(dim=-1).gather(2, tokens[:, 1:, None])
            loss = -picked.mean()
            for routing in output.routings:
                E = 16
                share = torch.stack([(routing.topk_ids[:, 0] == e).double().mean() for e in range(E)])
                dot = (share * routing.scores.mean(dim=0)).sum()
                loss = loss + 0.7 * (E * dot if balance_loss == "switch" else dot / E)
                loss = loss + 0.05 * (routing.logits.exp().sum(dim=1).log() ** 2).mean()
            for total, part in zip(gradients, torch.autograd.grad(loss, list(mine.parameters())), strict=True):
                total += part / 2
        if step == 0:
            counts = [torch.bincount(r.topk_ids.flatten(), minlength=16).double() for r in output.routings]
            vio = sum(float(c.max() / c.mean()) - 1 for c in counts) / len(counts)
            dropped = sum(float((~r.kept).double().mean()) for r in output.routings) / len(counts)
            assert dropped > 0
            (figures,) = run.routing
            loads = figures.pop("loads")
            assert figures == {"step": 0, "max_vio": round(vio, 4), "drop_rate": round(dropped, 4)}
            assert loads == [[pytest.approx(float(n / c.mean()), abs=6e-4) for n in c] for c in counts]
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        clipped.append(norm > 0.5)
        with torch.no_grad():
            for (name, weight), g, m, v in zip(mine.named_parameters(), gradients, first, second, strict=True):
                g *= min(1.0, 0.5 / norm)
                m.copy_(0.8 * m + 0.2 * g)
                v.copy_(0.9 * v + 0.1 * g**2)
                if "norm" not in name and "router" not in name:
                    weight *= 1 - rate * 0.3
                weight -= rate * (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-8)
    assert any(clipped), "the case should clip"
    for (name, got), expected in zip(model.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7, msg=name)


V3 = MoEConfig(
    n_routed_experts=8,
    top_k=2,
    expert_width=16,
    n_shared_experts=1,
    scoring_func="sigmoid",
    expert_bias=True,
    norm_topk_prob=True,
    n_group=4,
    topk_group=2,
    group_score="top2",
)


def make_with(moe: MoEConfig, batch_size: int = CONFIG.batch_size, seed: int = 0) -> tuple[Transformer, Batches]:
    world, tokenizer = small_world()
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, moe=moe, vocab_size=tokenizer.get_vocab_size()))
    return model, Batches(world, tokenizer, batch_size, CONFIG.seq_len)


def test_every_balance_loss_has_its_weight_in_every_layer() -> None:
    moe = MoEConfig(n_routed_experts=8, top_k=2, expert_width=16, noisy_gating=True, n_group=4, topk_group=4)
    model, batches = make_with(moe)
    output = model.train()(next(batches).tokens[:, :-1])
    devices = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    losses = {name: getattr(balance, f"{name}_loss") for name in BALANCE_LOSSES}
    losses["device"] = lambda r: balance.device_loss(r, device_of=devices)
    losses["communication"] = lambda r: balance.communication_loss(r, device_of=devices, topk_group=4)
    weights = {name: 0.1 * (place + 1) for place, name in enumerate(BALANCE_LOSSES)}
    expected = sum(weight * losses[name](r) for r in output.routings for name, weight in weights.items())
    got = balance_terms(output, moe, weights)
    assert len(output.routings) == 2
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    weights["load"] = 0.0  # nothing is asked of a loss without weight
    model.eval()
    balance_terms(model(next(batches).tokens[:, :-1]), moe, weights)


def test_the_bias_moves_once_a_step_by_the_counts_of_all_micro_batches() -> None:
    model, batches = make_with(V3, batch_size=2)
    before, same = copy.deepcopy(model), make_with(V3, batch_size=2)[1]
    counts = [torch.zeros(8), torch.zeros(8)]
    for _ in range(3):
        for total, routing in zip(counts, before.train()(next(same).tokens[:, :-1]).routings, strict=True):
            for e in routing.topk_ids.flatten().tolist():
                total[e] += 1
    train(model, batches, replace(CONFIG, steps=1, batch_size=2, grad_accum=3, bias_speed=0.25))
    for layer, total in zip(model.moe_layers, counts, strict=True):
        mean = 3 * 2 * CONFIG.seq_len * 2 / 8
        expected = [0.25 * ((mean > n) - (mean < n)) for n in total.tolist()]
        assert layer.router.expert_bias.tolist() == expected
        assert set(expected) >= {0.25, -0.25}


def test_loss_free_balancing_lowers_the_violation() -> None:
    world, tokenizer = small_world()
    held_out = heldout_batches(world, tokenizer, 4, 32, 12)

    def violation(bias_speed: float) -> float:
        """MaxVio_global, the mean over two seeds and two layers."""
        seen = []
        for seed in range(2):
            model, batches = make_with(V3, batch_size=8, seed=seed)
            config = replace(CONFIG, steps=100, batch_size=8, lr=1e-2, balance={}, bias_speed=bias_speed)
            train(model, batches, config)
            seen += [use.max_vio for use in heldout_loss(model, held_out, world.domains).experts]
        return sum(seen) / len(seen)

    assert violation(0.003) < 0.5 * violation(0.0)


def test_a_run_with_bias_and_noise_resumes_exactly(tmp_path: Path) -> None:
    moe = replace(V3, noisy_gating=True)
    config = replace(CONFIG, bias_speed=0.01, balance={"sequence": 0.01, "communication": 0.01})
    model, batches = make_with(moe)
    unbroken = train(model, batches, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsmoe_lite.training.processes.save_training", _save_then_die_at(5))
        with pytest.raises(KeyboardInterrupt):
            train(*make_with(moe), config, folder=tmp_path)
    again, batches = make_with(moe)
    resumed = train(again, batches, config, folder=tmp_path)
    assert resumed.losses == unbroken.losses
    assert again.state_dict().keys() >= {f"blocks.{i}.ffn.router.expert_bias" for i in range(2)}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(("precision", "dtype"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")])
def test_precision_decides_the_type_of_the_products(precision: str, dtype: str) -> None:
    model, batches = make()
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    train(model, batches, replace(CONFIG, steps=1, precision=precision))
    assert seen == [getattr(torch, dtype)]


def test_a_record_gives_speed_over_all_seconds() -> None:
    model, _ = make()
    run = Run(losses=[3.0] * 12, seconds=4.0, tokens=100)
    assert run_record(run, model, CONFIG)["tokens_per_second"] == 25
    assert run_record(run, model, CONFIG)["finished"]
    assert not run_record(run, model, replace(CONFIG, steps=13))["finished"]


def test_router_and_norms_are_not_decayed() -> None:
    model, _ = make()
    decayed, plain = make_optimizer(model, CONFIG).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(w)] for w in plain["params"]} == {n for n in names.values() if "norm" in n or "router" in n}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert plain["weight_decay"] == 0.0


def test_heldout_loss_is_the_mean_over_tokens_and_domains() -> None:
    model, _ = make()
    world, tokenizer = small_world()
    batches = heldout_batches(world, tokenizer, 4, 32, 8)
    got = heldout_loss(model, batches, world.domains)
    total = {name: [0.0, 0] for name in world.domains}
    model.eval()
    with torch.no_grad():
        for batch in batches:
            log_p = model(batch.tokens[:, :-1]).logits.log_softmax(dim=-1)
            for b in range(4):
                for s in range(32):
                    cell = total[world.domains[int(batch.domains[b, s + 1])]]
                    cell[0] -= float(log_p[b, s, batch.tokens[b, s + 1]])
                    cell[1] += 1
    assert got.loss == pytest.approx(sum(v for v, _ in total.values()) / (8 * 4 * 32), rel=1e-5)
    assert sum(count > 0 for _, count in total.values()) > 1, "the case should have several domains"
    for name, (value, count) in total.items():
        assert (name in got.by_domain) == (count > 0)
        if count:
            assert got.by_domain[name] == pytest.approx(value / count, rel=1e-5)


def test_heldout_use_of_experts_is_counted_over_all_batches() -> None:
    moe = replace(SMALL.moe, second_choice="all", capacity_factor=0.1, eval_capacity_factor=0.9)
    model, _ = make_with(moe)
    world, tokenizer = small_world()
    for layer in model.moe_layers:
        torch.nn.init.normal_(layer.router.weight, std=0.3)
    batches = heldout_batches(world, tokenizer, 4, 32, 5)
    got = heldout_loss(model, batches, world.domains).experts
    assert len(got) == 2
    K, E, T = 2, 16, 4 * 32
    counts, kept, over = [[0] * E for _ in got], [0] * 2, [0] * 2
    with torch.no_grad():
        for batch in batches:
            for place, routing in enumerate(model.eval()(batch.tokens[:, :-1]).routings):
                here = [0] * E
                for e in routing.topk_ids.flatten().tolist():
                    here[e] += 1
                counts[place] = [a + b for a, b in zip(counts[place], here, strict=True)]
                kept[place] += sum(min(n, math.ceil(0.9 * T * K / E)) for n in here)
                over[place] += sum(max(0, n - math.ceil(1.25 * T * K / E)) for n in here)
    everything = 5 * T * K
    for use, count, kept_here, over_here in zip(got, counts, kept, over, strict=True):
        assert use.load == pytest.approx([n * E / everything for n in count])
        assert use.max_vio == pytest.approx(max(count) * E / everything - 1)
        assert use.drop_rate == pytest.approx(1 - kept_here / everything)
        assert use.overflow == pytest.approx(over_here / everything)
        assert 0 < use.overflow < use.drop_rate < 1
    dense = replace(preset("course-dense"), d_model=32, vocab_size=tokenizer.get_vocab_size())
    assert heldout_loss(Transformer(dense), batches, world.domains).experts == []


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_is_in_evaluation_mode_and_leaves_the_model_in_its_own(training: bool) -> None:
    model, _ = make()
    world, tokenizer = small_world()
    questions = [q for group in ("head", "tail") for q in world.questions(group)]
    assert len(questions) > 10
    model.train(training)
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append((model.training, len(output))))
    heldout_loss(model, heldout_batches(world, tokenizer, 4, 32, 1), world.domains)
    assert seen == [(False, 4)]
    seen.clear()
    recall(model, tokenizer, questions * 40)  # more than one batch of a length
    assert {mode for mode, _ in seen} == {False}
    assert sum(rows for _, rows in seen) == 40 * len(questions)
    assert model.training is training


def test_recall_is_greedy_decoding_word_for_word() -> None:
    from dsmoe_lite.generate import generate

    model, batches = make()
    dropless = replace(model.config.moe, eval_capacity_factor=None)
    for block in model.blocks:
        block.ffn.router.config = dropless  # so that a question's answer does not depend on its batch
    train(model, batches, replace(CONFIG, steps=150))
    world, tokenizer = small_world()
    texts = [document.text.split(" ") for document, _ in zip(world.documents("heldout"), range(12), strict=False)]
    questions = [
        Question(" ".join(words[:i]), " " + words[i], ("odd", "even")[i % 2 == 0], "")
        for words in texts
        for i in range(2, min(9, len(words)))
    ]  # the next word of a sentence: function words are learnt soon, names are not
    hits: dict[str, list[bool]] = {"odd": [], "even": []}
    for question in questions:
        prompt, answer = (tokenizer.encode(text).ids for text in (question.prompt, question.answer))
        (said,) = generate(model, [prompt], len(answer))
        hits[question.group].append(said == answer)
    expected = {group: sum(found) / len(found) for group, found in hits.items()}
    assert 0 < expected["odd"] < 1, "the case should have right and wrong answers"
    assert recall(model, tokenizer, questions) == expected


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model, batches = make()
    first = train(model, batches, CONFIG, folder=tmp_path)
    stamp = (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns
    model, batches = make()
    assert train(model, batches, CONFIG, folder=tmp_path).losses == first.losses
    assert (tmp_path / "checkpoint.safetensors").stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "settings.json").read_text())["train"]["steps"] == CONFIG.steps
