"""Jobs and grids of jobs: records, missing runs, failures."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from tokenizers import Tokenizer

from dsmoe_lite.checkpoint import load_model, read_metadata
from dsmoe_lite.cli import main
from dsmoe_lite.common import paths
from dsmoe_lite.common.errors import DivergedError, InputError, RunError
from dsmoe_lite.config import ModelConfig, MoEConfig, from_dict, to_dict
from dsmoe_lite.data.batches import heldout_batches
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.stdlib import Stdlib
from dsmoe_lite.data.world import World, WorldConfig
from dsmoe_lite.evaluate import bits_per_byte, domain_use, heldout_loss
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.routing.interventions import mask_top, silence
from dsmoe_lite.study import grids
from dsmoe_lite.study.grids import Grid, missing, record_path, records, run_missing
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job, corpus_of, first_steps, make_corpus, read_job, run_job
from dsmoe_lite.training.optimizer import learning_rate

WORLD = WorldConfig(n_entities=40, n_control=8, n_head=8, n_tail=8, n_documents=400, n_heldout=100)
JOB = Job(
    model=preset("course-gshard"),
    train=TrainConfig(steps=3, batch_size=2, seq_len=16, warmup_steps=1),
    corpus=CorpusConfig(world=WORLD),
    vocab_size=300,
    n_heldout_batches=2,
    device="cpu",
)
GRID = Grid({name: replace(JOB, model=preset(name)) for name in ("course-dense", "course-gshard")}, (0, 1), 2)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("DSMOE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def test_a_job_from_yaml_equals_the_dataclass(tmp_path: Path) -> None:
    text = (
        "model: course-gshard\nvocab_size: 300\nn_heldout_batches: 2\ndevice: cpu\n"
        "train: {steps: 3, batch_size: 2, seq_len: 16, warmup_steps: 1}\n"
        "corpus: {kind: world, world: {n_entities: 40, n_control: 8, n_head: 8, n_tail: 8, n_documents: 400,"
        " n_heldout: 100}}\n"
    )
    (tmp_path / "named.yaml").write_text(text)
    assert read_job(tmp_path / "named.yaml") == JOB
    (tmp_path / "written.json").write_text(json.dumps(to_dict(JOB)))
    assert read_job(tmp_path / "written.json") == JOB


def test_the_shipped_model_has_its_job() -> None:
    job = read_job(paths.DATA / "models" / "world-gshard.yaml")
    facts = read_metadata(paths.DATA / "models" / "world-gshard.safetensors")
    shipped = from_dict(ModelConfig, facts["config"])
    assert shipped == replace(job.model, vocab_size=shipped.vocab_size)


def test_a_config_names_its_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words\n" * 5000)
    world = make_corpus(JOB.corpus)
    assert isinstance(world, World)
    assert world.fingerprint() == World(WORLD).fingerprint()
    assert isinstance(make_corpus(CorpusConfig(kind="stdlib")), Stdlib)
    folder = make_corpus(CorpusConfig(kind="folder", path=str(tmp_path)))
    assert isinstance(folder, Folder)
    assert folder.fingerprint()["bytes"] == 30_000


def test_a_model_file_names_its_corpus(tmp_path: Path) -> None:
    run_job(JOB, tmp_path)
    facts = read_metadata(tmp_path / "model.safetensors")
    assert corpus_of(facts).fingerprint()["sha256"] == World(WORLD).fingerprint()["sha256"] == facts["corpus"]["sha256"]
    assert isinstance(corpus_of({"corpus": {"name": "stdlib"}}), Stdlib)
    for other in ({}, {"corpus": {"name": "folder"}}):
        with pytest.raises(InputError, match=r"corpus = .*: the model file does not locate this text"):
            corpus_of(other)


def test_a_record_agrees_with_the_saved_model(tmp_path: Path) -> None:
    record = run_job(JOB, tmp_path)
    assert json.loads(json.dumps(record)) == json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["finished"]
    assert len(record["losses"]) == 3
    assert record["tokens"] == 3 * 2 * 16
    assert record["vocab_size"] == record["model"]["vocab_size"] == 300
    assert record["corpus"] == World(WORLD).fingerprint()
    assert set(record["recall"]) == {"head", "tail", "control"}

    model = load_model(tmp_path / "model.safetensors")
    tokenizer = Tokenizer.from_str(read_metadata(tmp_path / "model.safetensors")["tokenizer"])
    ids: list[int] = []
    for document in World(WORLD).documents("heldout"):
        ids += [*tokenizer.encode(document.text).ids, 0]  # 0 is <|end|>
    rows = torch.tensor(ids[: 2 * 64 * 17]).view(2, 64, 17)  # 2 batches of 64 rows of 16 + 1 tokens
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(r[:, :-1]).logits.transpose(1, 2), r[:, 1:]).item() for r in rows
        ]
    assert record["heldout_loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_only_seed_and_first_document_decide_a_run() -> None:
    job = replace(JOB, model=preset("course-dense"))  # only the weights are random
    first = run_job(job)["losses"]
    assert run_job(job)["losses"] == first
    assert run_job(replace(job, train=replace(job.train, seed=1)))["losses"][0] != first[0]  # other weights, same text
    assert run_job(replace(job, first_document=200))["losses"][0] != first[0]


def test_an_interrupted_job_evaluates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsmoe_lite.training.train import Run

    monkeypatch.setattr("dsmoe_lite.training.job.train", lambda *args, **kwargs: Run(losses=[1.0, 1.0]))
    monkeypatch.setattr("dsmoe_lite.training.job.heldout_loss", None)
    with pytest.raises(KeyboardInterrupt):
        run_job(JOB, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_train_prints_its_row_and_finds_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    (tmp_path / "my job.json").write_text(json.dumps(to_dict(JOB)))
    rows = []
    for _ in range(2):
        with pytest.raises(SystemExit) as stopped:
            main(["train", str(tmp_path / "my job.json"), "--json"])
        assert stopped.value.code == 0
        rows += json.loads(capsys.readouterr().out)
    assert rows[0] == rows[1]  # trained once: even its speed is the recorded one
    assert rows[0]["run"] == str(tmp_path / "runs" / "my job")
    assert rows[0]["finished"]
    record = json.loads((tmp_path / "runs" / "my job" / "record.json").read_text(encoding="utf-8"))
    assert rows[0]["held-out loss"] == record["heldout_loss"]


# Grids


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The grid "small" of two models and two seeds, recorded in a temporary folder."""
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    monkeypatch.setattr(grids, "GRIDS", {"small": GRID})
    monkeypatch.setattr(Job, "check_record", lambda self, record: None)  # the tests make them up
    monkeypatch.setenv("DSMOE_TEST_RECORDS", str(tmp_path / "runs" / "small"))
    return tmp_path


def record(model: str, seed: int, /, **values: object) -> None:
    path = record_path("small", model, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def test_runs_of_a_grid_differ_only_in_model_seed_and_first_document() -> None:
    job = GRID.job("course-gshard", 1)
    assert job == replace(JOB, train=replace(JOB.train, seed=1), first_document=200)
    assert GRID.job("course-dense", 0).first_document == 0
    with pytest.raises(InputError, match="seed = 2: must be a whole number of at least 0 and at most 1"):
        Grid({}, (0, 1, 2), n_streams=2)


def test_missing_runs_are_listed_seed_by_seed(small: Path, capsys: pytest.CaptureFixture) -> None:
    all_runs = [("course-dense", 0), ("course-gshard", 0), ("course-dense", 1), ("course-gshard", 1)]
    assert missing("small") == all_runs
    record("course-gshard", 0, x=1)
    assert missing("small") == [pair for pair in all_runs if pair != ("course-gshard", 0)]
    assert records("small") == [{"model_name": "course-gshard", "seed": 0, "x": 1}]
    experiment(["--plan", "--json"])
    assert json.loads(capsys.readouterr().out)[0] == {"model": "course-dense", "seed": 0}
    experiment(["--plan", "--json", "--models", "course-gshard"])
    assert json.loads(capsys.readouterr().out) == [{"model": "course-gshard", "seed": 1}]
    with pytest.raises(InputError, match="model = 'gshrad': must be one of course-dense, course-gshard"):
        missing("small", ["course-dense", "gshrad"])
    for pair in all_runs:
        record(*pair)
    experiment(["--plan", "--json"])
    assert json.loads(capsys.readouterr().out) == []
    experiment([])
    assert capsys.readouterr().out == "small: every run is recorded.\n"


def test_a_profile_has_its_tier_of_a_grid() -> None:
    assert [grids.grid_name("paper", profile) for profile in ("cpu", "gpu")] == ["paper", "paper-gpu"]
    assert grids.grid_name("text-long", "gpu") == "text-long-gpu"
    with pytest.raises(InputError, match="profile = 'gpu': neighbours has no such tier; choose from text-long, paper"):
        grids.grid_name("neighbours", "gpu")


def test_only_the_named_models_are_run(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "ProcessPoolExecutor", InThisProcess)
    done = run_missing("small", 1, lambda job, folder: {"x": 1}, models=["course-gshard"])
    assert sorted(done) == [("course-gshard", 0), ("course-gshard", 1)]
    assert missing("small") == [("course-dense", 0), ("course-dense", 1)]


def experiment(options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["experiment", "small", *options])
    assert stopped.value.code == 0


def seeds_then_death(job: Job, at: Path) -> dict[str, int]:
    """A stand-in for run_job in a worker: seed 1 dies once both runs of seed 0 are recorded."""
    if job.train.seed == 0:
        return {"width": job.model.ffn_width, "threads": torch.get_num_threads()}
    folder, deadline = Path(os.environ["DSMOE_TEST_RECORDS"]), time.monotonic() + 60
    while len(list(folder.glob("*-seed0.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os._exit(9)


def test_a_dead_process_is_one_line_and_leaves_its_records(small: Path) -> None:
    record("course-gshard", 0, earlier=True)
    done: list[tuple[str, int]] = []
    with pytest.raises(RunError, match="small: a process died"):
        done.extend(run_missing("small", 1, seeds_then_death))  # keeps what is yielded before the error
    assert done == [("course-dense", 0)]
    results = {record["model_name"]: record for record in records("small")}
    assert results["course-dense"] == {"model_name": "course-dense", "seed": 0, "width": 128, "threads": 1}
    assert results["course-gshard"]["earlier"]  # a recorded run is not run again
    assert missing("small") == [("course-dense", 1), ("course-gshard", 1)]


ENDLESS = """
import os, sys, time
from pathlib import Path
from dsmoe_lite.common import paths
from dsmoe_lite.study import grids

FOLDER = Path(sys.argv[1])

class Endless:
    def seeded(self, seed, n_streams):
        return self
    def run(self, folder):
        (FOLDER / f"{os.getpid()}.pid").touch()
        time.sleep(120)

if __name__ == "__main__":
    paths.DATA_FOLDERS = (FOLDER,)
    grids.GRIDS = {"endless": grids.Grid({"one": Endless()}, (0, 1), 2)}
    list(grids.run_missing("endless", 2))
"""


def test_the_workers_of_a_killed_experiment_exit_too(tmp_path: Path) -> None:
    script, deadline = tmp_path / "endless.py", time.monotonic() + 90
    script.write_text(ENDLESS, encoding="utf-8")
    with subprocess.Popen([sys.executable, str(script), str(tmp_path)], stderr=subprocess.DEVNULL) as parent:
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            assert parent.poll() is None
            time.sleep(0.05)
        parent.kill()
    running = {int(path.stem) for path in tmp_path.glob("*.pid")}
    assert len(running) == 2
    while running and time.monotonic() < deadline:
        running = {pid for pid in running if _is_running(pid)}
        time.sleep(0.05)
    assert not running


def _is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class InThisProcess:
    """A pool that runs jobs in this process, for tests that need no second one."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "InThisProcess":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def shutdown(self, **options: bool) -> None:
        pass

    def submit(self, run, *arguments):
        from concurrent.futures import Future

        future: Future = Future()
        try:
            future.set_result(run(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future


def test_a_time_limit_interrupts_the_run_under_way_and_starts_no_other(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grids, "ProcessPoolExecutor", InThisProcess)
    started = []

    def wait(job: Job, folder: Path) -> dict[str, int]:
        started.append(folder.name)
        time.sleep(60)
        return {"x": 1}

    assert list(run_missing("small", 1, wait, minutes=0.3 / 60)) == []
    assert started == ["course-dense-seed0"]
    assert len(missing("small")) == 4


def test_an_interrupted_run_of_a_grid_goes_on_where_it_stopped(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(paths, "RUNS", small / "runs")
    long = replace(JOB, train=replace(JOB.train, steps=8))
    monkeypatch.setattr(grids, "GRIDS", {"small": Grid({"course-gshard": long}, (0,), 2)})
    steps = []

    def interrupt_once(step: int, config: TrainConfig) -> float:
        steps.append(step)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return learning_rate(step, config)

    monkeypatch.setattr("dsmoe_lite.training.train.learning_rate", interrupt_once)
    with pytest.raises(KeyboardInterrupt):
        list(run_missing("small", 1))
    assert missing("small")
    assert list(run_missing("small", 1)) == [("course-gshard", 0)]
    assert steps == list(range(8))
    assert not list((small / "runs").rglob("*.safetensors"))  # recorded: the checkpoint is not needed any more
    (found,) = records("small")
    assert found["losses"] == long.seeded(0, 2).run()["losses"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("loss = nan at step 3")])
def test_a_run_that_stops_early_is_not_recorded(
    small: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(grids, "ProcessPoolExecutor", InThisProcess)

    def stop(job: Job, folder: Path) -> dict[str, int]:
        raise error

    with pytest.raises(type(error)):
        list(run_missing("small", 1, stop))
    assert records("small") == []


def test_a_shared_expert_without_replacement_is_not_an_error() -> None:
    # every token uses all routed experts, so none can replace the shared one
    every = MoEConfig(n_routed_experts=4, top_k=4, expert_width=8, n_shared_experts=1)
    record = run_job(replace(JOB, model=replace(JOB.model, moe=every)))
    assert record["finished"]
    assert "shared_swapped" not in record
    one = replace(every, top_k=1)
    assert run_job(replace(JOB, model=replace(JOB.model, moe=one)))["shared_swapped"]["heldout_loss"] > 0


def test_a_record_has_the_interventions_and_domains_that_were_asked_for(tmp_path: Path) -> None:
    job = replace(JOB, masked=(1 / 16,), silenced=(1, 2), by_domain=True)
    record = run_job(job, tmp_path)
    model, corpus = load_model(tmp_path / "model.safetensors"), World(WORLD)
    tokenizer = Tokenizer.from_str(read_metadata(tmp_path / "model.safetensors")["tokenizer"])
    batches = heldout_batches(corpus, tokenizer, 64, 16, 2)

    def loss(changed: Transformer) -> float:
        return heldout_loss(changed, batches, corpus.domains).loss

    found = {n: record["silenced"][n]["heldout_loss"] for n in ("1", "2")}
    assert found == pytest.approx({"1": loss(silence(model, ranks=[0])), "2": loss(silence(model, ranks=[0, 1]))})
    assert record["masked"]["0.0625"]["heldout_loss"] == pytest.approx(loss(mask_top(model, 1 / 16)))
    assert len({record["heldout_loss"], *found.values()}) == 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.train.seed)
        untrained = Transformer(model.config)
    n_domains = len(corpus.domains)
    assert record["domain_use"] == {
        "trained": [to_dict(use) for use in domain_use(model, batches, n_domains)],
        "untrained": [use.uncertainty for use in domain_use(untrained, batches, n_domains)],
    }
    bits = bits_per_byte(heldout_loss(model, batches, corpus.domains), batches, tokenizer, corpus.domains)
    assert record["heldout_bits_per_byte"] == pytest.approx(bits)
    job.check_record(record)
    for other in (replace(job, silenced=(1,)), replace(job, by_domain=False)):
        with pytest.raises(InputError):
            other.check_record(record)


def test_a_record_of_other_settings_is_refused_with_the_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "DATA_FOLDERS", (tmp_path,))
    monkeypatch.setattr(grids, "GRIDS", {"small": GRID})
    written = json.loads(json.dumps(GRID.job("course-gshard", 1).run()))
    record("course-gshard", 1, **written)
    assert records("small") == [{"model_name": "course-gshard", "seed": 1, **written}]
    for change, message in (
        ({"model": written["model"] | {"n_layers": 3}}, "model.n_layers = 3: this run has 2"),
        ({"train": written["train"] | {"lr": 0.5}}, "train.lr = 0.5: this run has 0.003"),
        ({"first_document": 0}, "first_document = 0: this run has 200"),
        ({"masked": {"0.25": {}}}, "masked = ['0.25']: this run has []"),
        ({"active": {"1": {}}}, "active = ['1']: this run has []"),
        ({"corpus": {"config": written["corpus"]["config"] | {"n_values": 4}}}, "corpus.n_values = 4"),
        ({"model": None}, "model = None: must be a mapping; not the record of a run"),
        ({"model": 3}, "model = 3: must be a mapping"),
        ({"model": {}}, "vocab_size: is missing"),
        ({"train": []}, "train = []: must be a mapping"),
        ({"train": {"steps": 3}}, "train.seed = None: must be a whole number"),
        ({"first_document": None}, "first_document = None: must be a whole number"),
        ({"losses": ["1.5"]}, "losses = '1.5': must be a finite number"),
        ({"heldout_loss": "1.5"}, "heldout_loss = '1.5': must be a number"),
        ({"masked": 3}, "masked = 3: must be a mapping"),
        ({"corpus": {}}, "corpus.config = None: must be a mapping"),
        ({"schema_version": [2]}, "schema_version = [2]: this package reads 1 and 2"),
    ):
        record("course-gshard", 1, **written | change)
        with pytest.raises(InputError, match=f"course-gshard-seed1.json: {re.escape(message)}"):
            records("small")


def test_a_record_of_another_protocol_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(grids, "GRIDS", {"small": replace(GRID, protocol=2)})
    list(run_missing("small", 1, lambda job, folder: {"x": 1}))
    assert {record["protocol"] for record in records("small")} == {2}
    record("course-dense", 0, protocol=1)
    with pytest.raises(InputError, match="protocol = 1: this grid follows 2"):
        records("small")


def test_a_run_that_diverges_is_recorded(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "ProcessPoolExecutor", InThisProcess)

    def diverge(self: Job, folder: Path) -> dict[str, object]:
        if self.train.seed == 1:
            raise DivergedError("loss = nan at step 3")
        return {"x": 1}

    monkeypatch.setattr(Job, "run", diverge)
    assert len(list(run_missing("small", 1))) == 4
    assert missing("small") == []
    with pytest.raises(InputError, match="diverged = 'loss = nan at step 3': this run has no results"):
        records("small")
    assert ["diverged" in record for record in records("small", diverged=True)] == [False, True, False, True]


def test_first_steps_are_those_of_the_full_run() -> None:
    losses = run_job(JOB)["losses"]
    run = first_steps(JOB, 2)
    assert run.losses == pytest.approx(losses[:2], abs=1e-4)
    assert run.steps_done == 2
    with pytest.raises(InputError, match="until = 4: must be a whole number of at least 1 and at most 3"):
        first_steps(JOB, 4)


def test_interventions_that_a_hash_layer_cannot_have_are_refused_before_the_run() -> None:
    config = preset("course-v4")
    for options, message in (({"masked": (0.1,)}, "chooser = 'hash'"), ({"active": (3,)}, "chooser = 'hash'")):
        with pytest.raises(InputError, match=message):
            Job(model=config, train=TrainConfig(steps=1, balance={}), **options)
    assert Job(model=replace(config, n_hash_layers=0), train=TrainConfig(steps=1, balance={}), masked=(0.1,))
