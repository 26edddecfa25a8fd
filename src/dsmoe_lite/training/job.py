"""A whole run from one description: model, corpus, tokenizer, training, evaluation, record."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from dsmoe_lite.checkpoint import save_model
from dsmoe_lite.common.errors import InputError, require, require_choice, require_number, require_same, require_whole
from dsmoe_lite.common.files import write_json
from dsmoe_lite.common.machine import resolve_device
from dsmoe_lite.config import ModelConfig, from_dict, read_yaml, to_dict
from dsmoe_lite.data.batches import Batch, Batches, heldout_batches
from dsmoe_lite.data.corpus import Corpus
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.hub import Hub
from dsmoe_lite.data.stdlib import Stdlib
from dsmoe_lite.data.tokenizer import load_tokenizer
from dsmoe_lite.data.world import World, WorldConfig
from dsmoe_lite.evaluate import heldout_loss, recall
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.routing.interventions import mask_top, swap_shared, with_active
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.processes import SINGLE_PROCESS, Processes
from dsmoe_lite.training.record import Run, run_record
from dsmoe_lite.training.train import train

CORPORA = ("world", "stdlib", "folder", "hub")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Which text: `world` with its own settings, `stdlib`, `folder` with a path, `hub` with a data set's name."""

    kind: str = "world"
    world: WorldConfig = field(default_factory=WorldConfig)
    path: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, CORPORA)
        require(self.kind != "folder" or self.path != "", "path", self.path, "kind = 'folder' needs the folder's path")
        require(self.kind != "hub" or self.name != "", "name", self.name, "kind = 'hub' needs the data set's name")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides a run. The model's vocabulary is set by the tokenizer that is trained on the corpus."""

    model: ModelConfig
    train: TrainConfig
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    vocab_size: int = 1024
    first_document: int = 0  # where in the corpus training starts to read
    n_heldout_batches: int = 16
    masked: tuple[float, ...] = ()  # evaluated again with these shares of each token's best experts out of reach
    active: tuple[int, ...] = ()  # evaluated again with so many routed experts a token
    device: str = "auto"
    expert_parallel: int = 0  # under torchrun, processes that share one set of experts; 0: all of them

    def __post_init__(self) -> None:
        require_whole("vocab_size", self.vocab_size, 257)
        require_whole("first_document", self.first_document, 0)
        require_whole("n_heldout_batches", self.n_heldout_batches, 1)
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_whole("expert_parallel", self.expert_parallel, 0)
        longest = f"must be at most max_seq_len = {self.model.max_seq_len}"
        require(self.train.seq_len <= self.model.max_seq_len, "seq_len", self.train.seq_len, longest)
        self.train.check_fits(self.model.moe)
        for share in self.masked:
            require_number("masked", share, 0.0, 1.0)
        for k in self.active:
            require_whole("active", k, 1)

    def seeded(self, seed: int, n_streams: int) -> "Job":
        """The same run with another seed: it draws the weights and sets where in the corpus reading starts.

        The corpus has n_streams parts, one a seed.
        """
        start = seed * self.corpus.world.n_documents // n_streams
        return replace(self, train=replace(self.train, seed=seed), first_document=start)

    def run(self) -> dict[str, Any]:
        """The run's record."""
        return run_job(self)

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Raise InputError naming the first setting in which a record is not of this run.

        Records of schema_version 1 describe balance losses otherwise: of how they were trained only steps and seed are
        compared.
        """
        require(bool(record.get("model")), "model", record.get("model"), "is missing: not the record of a run")
        model = from_dict(ModelConfig, record["model"])
        found: dict[str, Any] = {"model": to_dict(model), "first_document": record["first_document"]}
        found["train"] = record["train"]
        wanted: dict[str, Any] = {
            "model": to_dict(replace(self.model, vocab_size=model.vocab_size)),
            "first_document": self.first_document,
            "train": to_dict(self.train),
        }
        if record["schema_version"] == 1:
            for settings in (found, wanted):
                settings["train"] = {name: settings["train"][name] for name in ("steps", "seed")}
        else:
            found["train"] = to_dict(from_dict(TrainConfig, found["train"]))
        found |= {name: sorted(record.get(name, {})) for name in ("masked", "active")}
        wanted |= {"masked": sorted(map(str, self.masked)), "active": sorted(map(str, self.active))}
        if self.corpus.kind == "world":
            found["corpus"] = to_dict(from_dict(WorldConfig, record["corpus"]["config"]))
            wanted["corpus"] = to_dict(self.corpus.world)
        require_same(found, wanted)


def read_job(path: Path) -> Job:
    """Read a job from YAML or JSON; `model` may be a preset's name. InputError names what is wrong."""
    values = read_yaml(path)
    try:
        if isinstance(values.get("model"), str):
            values["model"] = vars(preset(values["model"]))
        return from_dict(Job, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def make_corpus(config: CorpusConfig) -> Corpus:
    """Return the corpus a config names."""
    if config.kind == "world":
        return World(config.world)
    if config.kind == "stdlib":
        return Stdlib()
    return Folder(Path(config.path)) if config.kind == "folder" else Hub(config.name)


def corpus_of(facts: Mapping[str, Any]) -> Corpus:
    """Return the corpus that a model file was trained on, by its facts. InputError where they do not hold enough."""
    trained_on: Mapping[str, Any] = facts.get("corpus", {})
    name = trained_on.get("name")
    if name == "world":
        return World(from_dict(WorldConfig, trained_on["config"]))
    require(name == "stdlib", "corpus", name, "a model file does not say where such text lies; give a folder of text")
    return Stdlib()


def first_steps(job: Job, steps: int) -> Run:
    """The first `steps` steps of a run, as they are in the whole one; nothing is evaluated or kept."""
    _, _, model, batches = _prepare(job, SINGLE_PROCESS)
    return train(model, batches, job.train, until=steps)


def run_job(
    job: Job, folder: Path | None = None, *, snapshots: Collection[int] = (), processes: Processes = SINGLE_PROCESS
) -> dict[str, Any]:
    """Train and evaluate; with `folder`, resume what is there and leave model.safetensors and record.json.

    `snapshots`, for which a folder is needed: also the model after so many steps, as step<n>.safetensors. Of many
    `processes`, each of which must call with the same job, one gathers the trained model, evaluates it and returns the
    record; the others do not wait for it, and return nothing.
    Interrupted, it ends with KeyboardInterrupt after the current step; `folder` then holds a checkpoint to go on from.
    """
    for step in snapshots:
        require_whole("snapshot", step, 1, job.train.steps)
    require(folder is not None or not snapshots, "snapshots", snapshots, "need a folder")
    corpus, tokenizer, model, batches = _prepare(job, processes)
    held_back = heldout_batches(corpus, tokenizer, 64, job.train.seq_len, job.n_heldout_batches)
    about = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.to_str()}

    def keep(step: int) -> None:
        if folder is None or step not in snapshots:
            return
        path, full = folder / f"step{step}.safetensors", processes.gather_model(model)
        processes.on_rank0(lambda: save_model(path, cast(Transformer, full), **about))

    run = train(model, batches, job.train, folder=folder, after=keep, processes=processes)
    if run.steps_done < job.train.steps:
        raise KeyboardInterrupt
    full = processes.gather_model(model)
    if full is None:
        return {}
    if folder is not None:
        save_model(folder / "model.safetensors", full, **about)
    facts = {"first_document": job.first_document, "processes": processes.size}
    facts |= _evaluated(job, full, corpus, tokenizer, held_back)
    record = run_record(run, full, job.train, **facts)
    if folder is not None:
        write_json(folder / "record.json", record)
    return record


def _evaluated(
    job: Job, model: Transformer, corpus: Corpus, tokenizer: Tokenizer, held_back: list[Batch]
) -> dict[str, Any]:
    """What a trained model knows, and what is left of it after the job's interventions."""
    held_out = heldout_loss(model, held_back, corpus.domains)
    known: dict[str, float] = {}
    if isinstance(corpus, World):
        known = recall(model, tokenizer, corpus.all_questions())
    facts: dict[str, Any] = {"corpus": corpus.fingerprint(), "vocab_size": tokenizer.get_vocab_size()}
    facts |= {"heldout_loss": held_out.loss, "heldout_by_domain": held_out.by_domain, "recall": known}
    if held_out.experts:
        facts["heldout_experts"] = [to_dict(layer) for layer in held_out.experts]

    def losses_of(changed: Transformer) -> dict[str, Any]:
        found = heldout_loss(changed, held_back, corpus.domains)
        return {"heldout_loss": found.loss, "heldout_by_domain": found.by_domain}

    if job.model.moe is not None and job.model.moe.n_shared_experts:
        with suppress(InputError):  # one more routed expert may be out of reach
            facts["shared_swapped"] = losses_of(swap_shared(model, job.model.moe.n_shared_experts))
    if job.masked:
        facts["masked"] = {str(share): losses_of(mask_top(model, share)) for share in job.masked}
    if job.active:
        facts["active"] = {str(k): losses_of(with_active(model, k)) for k in job.active}
    return facts


def _prepare(job: Job, processes: Processes) -> tuple[Corpus, Tokenizer, Transformer, Batches]:
    """What a run starts with: its text, and the model as it is before the first step."""
    device = resolve_device(job.device)
    processes.join(device)
    processes.check_same(to_dict(job))
    corpus = make_corpus(job.corpus)
    text = processes.on_rank0(lambda: load_tokenizer(corpus, job.vocab_size).to_str())
    tokenizer = Tokenizer.from_str(text)
    torch.manual_seed(job.train.seed)
    model = Transformer(replace(job.model, vocab_size=tokenizer.get_vocab_size())).to(device)
    processes.shard(model, job.expert_parallel)
    batches = Batches(corpus, tokenizer, job.train.batch_size, job.train.seq_len)
    try:
        batches.load_state_dict({"epoch": 0, "document": job.first_document, "offset": 0})
    except InputError:
        raise InputError(f"first_document = {job.first_document}: {corpus.name} has fewer documents") from None
    return corpus, tokenizer, model, batches
