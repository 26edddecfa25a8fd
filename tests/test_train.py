"""Training: exact resume after kills, one owner a folder, bad input in one line, interrupts that keep the model."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsmoe_lite.checkpoint import load_model, load_training, read_tensors, save_model
from dsmoe_lite.config import to_dict
from dsmoe_lite.data.batches import Batches, heldout_batches
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import Question, World, WorldConfig
from dsmoe_lite.errors import InputError, RunError
from dsmoe_lite.evaluate import heldout_loss, recall
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.train import TrainConfig, learning_rate, make_optimizer, train

WORLD = WorldConfig(n_entities=40, n_control=8, n_head=8, n_tail=8, n_documents=400, n_heldout=100)
CONFIG = TrainConfig(steps=12, batch_size=4, seq_len=32, warmup_steps=3, checkpoint_every=1)
SMALL = replace(preset("course-gshard"), d_model=32, max_seq_len=64)

WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from test_train import CONFIG, make
from dsmoe_lite.train import train
model, batches = make()
print("ready", flush=True)
train(model, batches, CONFIG, folder=Path(sys.argv[1]))
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    torch.set_num_threads(1)


def make(seed: int = 0) -> tuple[Transformer, Batches]:
    world = World(WORLD)
    tokenizer = load_tokenizer(world, 512)
    torch.manual_seed(seed)
    model = Transformer(replace(SMALL, vocab_size=tokenizer.get_vocab_size()))
    return model, Batches(world, tokenizer, CONFIG.batch_size, CONFIG.seq_len)


def start_worker(folder: Path) -> subprocess.Popen:
    code = WORKER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)


def test_training_lowers_the_loss_and_reports_balance() -> None:
    model, batches = make()
    run = train(model, batches, replace(CONFIG, steps=40))
    assert run.losses[0] == pytest.approx(math.log(model.config.vocab_size), abs=0.2)
    assert sum(run.losses[-5:]) / 5 < run.losses[0] - 1
    assert [entry["step"] for entry in run.routing] == [0, 20]
    assert all(0 <= entry["drop_rate"] < 1 and entry["max_vio"] >= 0 for entry in run.routing)
    assert run.tokens == 40 * 4 * 32


def test_ten_kills_at_random_steps_change_no_loss(tmp_path: Path) -> None:
    model, batches = make()
    unbroken = train(model, batches, CONFIG).losses
    draw = random.Random(7)
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    kills = 0
    while kills < 10:
        worker = start_worker(tmp_path / "run")
        assert worker.stdout is not None
        worker.stdout.readline()  # ready: training starts now
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while worker.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(draw.random() * 0.05)
        if worker.poll() is not None:
            break  # the run reached its end before the tenth kill
        worker.kill()
        worker.wait()
        kills += 1
    assert kills >= 3
    worker = start_worker(tmp_path / "run")
    assert worker.wait(timeout=120) == 0
    _, facts = read_tensors(checkpoint)
    assert facts["training"]["losses"] == unbroken


def test_resume_from_every_step_equals_the_unbroken_run(tmp_path: Path) -> None:
    model, batches = make()
    unbroken = train(model, batches, CONFIG)
    reference = {name: value.clone() for name, value in model.state_dict().items()}
    for stop in range(1, CONFIG.steps):
        folder = tmp_path / str(stop)
        model, batches = make()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dsmoe_lite.train.save_training", _save_then_die_at(stop))
            with pytest.raises(KeyboardInterrupt):
                train(model, batches, CONFIG, folder=folder)
        model, batches = make(seed=99)  # weights and random state come from the checkpoint
        resumed = train(model, batches, CONFIG, folder=folder)
        assert resumed.losses == unbroken.losses
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


def test_two_real_processes_one_is_refused(tmp_path: Path) -> None:
    first = start_worker(tmp_path)
    assert first.stdout is not None
    first.stdout.readline()
    while first.poll() is None and not (tmp_path / "checkpoint.safetensors").exists():
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)  # hold it in the middle of the run
    model, batches = make()
    try:
        assert first.poll() is None, "the first process must still be at work"
        with pytest.raises(RunError, match="another process"):
            train(model, batches, CONFIG, folder=tmp_path)
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    model, batches = make()
    train(model, batches, CONFIG, folder=tmp_path)
    model, batches = make()
    with pytest.raises(InputError, match=r"train.lr = 0.5: .* holds a run with 0.003"):
        train(model, batches, replace(CONFIG, lr=0.5), folder=tmp_path)


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
    with pytest.raises(OSError, match="No space left"):
        save_model(path, model)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_an_interrupt_ends_after_the_step_and_keeps_the_model(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    model, batches = make()
    start = model.head.weight.clone()
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    run = train(model, batches, replace(CONFIG, steps=100_000, checkpoint_every=0), folder=tmp_path)
    assert 0 < run.steps_done < 100_000
    assert not torch.equal(model.head.weight, start)
    assert f"Stopped after step {run.steps_done} of 100000" in capsys.readouterr().out
    _, facts = read_tensors(tmp_path / "checkpoint.safetensors")
    assert facts["training"]["losses"] == run.losses


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
        ("balance_loss", "swich"),
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
    config = replace(CONFIG, balance_weight=0.0, steps=5)
    dense = replace(preset("course-dense"), d_model=32, max_seq_len=64)

    def losses(batch_size: int, accum: int) -> list[float]:
        world = World(WORLD)
        tokenizer = load_tokenizer(world, 512)
        torch.manual_seed(0)
        model = Transformer(replace(dense, vocab_size=tokenizer.get_vocab_size())).double()
        batches = Batches(world, tokenizer, batch_size, CONFIG.seq_len)
        return train(model, batches, replace(config, batch_size=batch_size, grad_accum=accum)).losses

    assert losses(2, 4) == pytest.approx(losses(8, 1), rel=1e-9)


def test_router_and_norms_are_not_decayed() -> None:
    model, _ = make()
    decayed, plain = make_optimizer(model, CONFIG).param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert {names[id(w)] for w in plain["params"]} == {n for n in names.values() if "norm" in n or "router" in n}
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert plain["weight_decay"] == 0.0


def test_heldout_loss_is_the_mean_over_tokens_and_domains() -> None:
    model, _ = make()
    world = World(WORLD)
    batches = heldout_batches(world, load_tokenizer(world, 512), 4, 32, 3)
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
    assert got.loss == pytest.approx(sum(v for v, _ in total.values()) / (3 * 4 * 32), rel=1e-5)
    for name, (value, count) in total.items():
        assert (name in got.by_domain) == (count > 0)
        if count:
            assert got.by_domain[name] == pytest.approx(value / count, rel=1e-5)


def test_recall_is_greedy_decoding_word_for_word() -> None:
    from dsmoe_lite.model import generate

    model, batches = make()
    dropless = replace(model.config.moe, eval_capacity_factor=None)
    for block in model.blocks:
        block.ffn.router.config = dropless  # so that a question's answer does not depend on its batch
    train(model, batches, replace(CONFIG, steps=150))
    world = World(WORLD)
    tokenizer = load_tokenizer(world, 512)
    texts = [document.text.split(" ") for document, _ in zip(world.documents("heldout"), range(12), strict=False)]
    questions = [
        Question(" ".join(words[:i]), " " + words[i], ("odd", "even")[i % 2 == 0], "")
        for words in texts
        for i in range(2, min(9, len(words)))
    ]  # the next word of a sentence: function words are learnt soon, names are not
    hits: dict[str, list[bool]] = {"odd": [], "even": []}
    for question in questions:
        prompt, answer = (tokenizer.encode(text).ids for text in (question.prompt, question.answer))
        said = generate(model, torch.tensor([prompt]), len(answer))[0, len(prompt) :].tolist()
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
