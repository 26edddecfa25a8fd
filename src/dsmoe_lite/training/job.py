"""A job: one description of model, corpus, training and evaluation, from which a run makes its record."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer

from dsmoe_lite.accounting import parameters
from dsmoe_lite.checkpoint import save_model
from dsmoe_lite.common.errors import (
    InputError,
    require,
    require_bool,
    require_choice,
    require_int,
    require_number,
    require_same,
    require_type,
)
from dsmoe_lite.common.files import write_json
from dsmoe_lite.common.machine import memory_bytes, resolve_device
from dsmoe_lite.common.schema import RECORD_REMEDY, require_entries, require_schema
from dsmoe_lite.common.yaml_files import read_yaml
from dsmoe_lite.config import ModelConfig, MoEConfig, from_dict, make_plain, to_dict
from dsmoe_lite.data.batches import Batch, Batches, heldout_batches
from dsmoe_lite.data.corpus import Corpus
from dsmoe_lite.data.debian import N_DOCUMENTS, Debian
from dsmoe_lite.data.folder import Folder
from dsmoe_lite.data.hub import Hub
from dsmoe_lite.data.inflected import Inflected, InflectedConfig
from dsmoe_lite.data.stdlib import Stdlib
from dsmoe_lite.data.tokenizer import load_tokenizer, read_tokenizer
from dsmoe_lite.data.world import World, WorldConfig
from dsmoe_lite.evaluate import bits_per_byte, domain_use, heldout_loss, recall
from dsmoe_lite.model import Transformer
from dsmoe_lite.presets import preset
from dsmoe_lite.routing.interventions import active_config, mask_top, n_masked, silence, swap_shared, with_active
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.processes import SINGLE_PROCESS, Processes
from dsmoe_lite.training.record import ENTRIES, READABLE_VERSIONS, Run, run_record
from dsmoe_lite.training.train import train

INTERVENTIONS = ("masked", "silenced", "active", "shared_swapped", "shared_silenced", "domain_use")  # if asked for
CORPORA = ("world", "inflected", "stdlib", "debian", "folder", "hub")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """The corpus: `world` or `inflected` with settings, `stdlib`, `debian`, `folder` with a path, `hub` with a name."""

    kind: str = "world"  # world, inflected, stdlib (Python's library), debian, folder or hub
    world: WorldConfig = field(default_factory=WorldConfig)
    inflected: InflectedConfig = field(default_factory=InflectedConfig)
    path: str = ""  # of kind folder: a folder of text files
    name: str = ""  # of kind hub: a data set of the Hugging Face Hub
    sha256: str = ""  # which the corpus's fingerprint must have; empty: any

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, CORPORA)
        require_type("world", self.world, WorldConfig)
        require_type("inflected", self.inflected, InflectedConfig)
        require_type("path", self.path, str)
        require_type("name", self.name, str)
        require_type("sha256", self.sha256, str)
        require(self.kind != "folder" or self.path != "", "path", self.path, "kind = 'folder' needs the folder's path")
        require(self.kind != "hub" or self.name != "", "name", self.name, "kind = 'hub' needs the data set's name")

    @property
    def n_documents(self) -> int:
        """About how many documents there are for training; 0 if only reading can tell."""
        made_up = {"world": self.world.n_documents, "inflected": self.inflected.n_documents}
        return (made_up | {"debian": N_DOCUMENTS}).get(self.kind, 0)


@dataclass(frozen=True, kw_only=True)
class Job:
    """All settings of a run. The tokenizer trained on the corpus sets the vocabulary of the model."""

    model: ModelConfig
    train: TrainConfig
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    vocab_size: int = 1024  # tokens of the tokenizer that is trained on the corpus
    first_document: int = 0  # the document of the corpus at which training starts
    n_heldout_batches: int = 16  # of 64 sequences, for the held-out loss
    masked: tuple[float, ...] = ()  # also evaluate with each of these shares of every token's top experts masked
    silenced: tuple[int, ...] = ()  # and with each token's best n routed experts silent, and none in their place
    active: tuple[int, ...] = ()  # and with each of these numbers of routed experts per token
    by_domain: bool = False  # also record which domains each expert gets, before and after training
    device: str = "auto"  # auto: a GPU if there is one; cpu or cuda
    expert_parallel: int = 0  # under torchrun, the processes that share one set of experts; 0: all of them

    def __post_init__(self) -> None:
        make_plain(self)
        require_type("model", self.model, ModelConfig)
        require_type("train", self.train, TrainConfig)
        require_type("corpus", self.corpus, CorpusConfig)
        require_type("masked", self.masked, tuple)
        require_type("silenced", self.silenced, tuple)
        require_type("active", self.active, tuple)
        require_bool("by_domain", self.by_domain)
        require_int("vocab_size", self.vocab_size, 257)
        require_int("first_document", self.first_document, 0)
        require_int("n_heldout_batches", self.n_heldout_batches, 1)
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_int("expert_parallel", self.expert_parallel, 0)
        longest = f"must be at most max_seq_len = {self.model.max_seq_len}"
        require(self.train.seq_len <= self.model.max_seq_len, "seq_len", self.train.seq_len, longest)
        self.train.check_fits(self.model.moe)
        layers: list[MoEConfig | None] = [*self.model.moe_layers]  # each must allow what follows
        for share in self.masked:
            require_number("masked", share, 0.0, 1.0)
            for moe in layers or [None]:
                n_masked(moe, share)
        for n in self.silenced:
            require_int("silenced", n, 1, 0 if self.model.moe is None else self.model.moe.top_k)
        require(not self.by_domain or self.model.moe is not None, "by_domain", self.by_domain, "needs experts")
        for k in self.active:
            require_int("active", k, 1)
            for moe in layers or [None]:
                active_config(moe, k)

    def seeded(self, seed: int, n_streams: int) -> "Job":
        """Return the same run with another seed, which decides the weights and the first document.

        The corpus is divided into n_streams parts, one per seed, if its size is known beforehand.
        """
        start = seed * self.corpus.n_documents // n_streams
        return replace(self, train=replace(self.train, seed=seed), first_document=start)

    def run(self, folder: Path | None = None) -> dict[str, Any]:
        """Run the job and return its record; a stopped run resumes from `folder`."""
        return run_job(self, folder)

    def check_record(self, record: Mapping[str, Any]) -> None:
        """Raise InputError if `record` has an unknown schema version, or naming the first setting that differs.

        Records of version 1 describe balance losses differently: of their training, only steps and seed are compared.
        """
        version = record.get("schema_version")
        require_schema(version, READABLE_VERSIONS, RECORD_REMEDY)
        remedy = f"not the record of a run; {RECORD_REMEDY}"
        optional = {name: dict for name in INTERVENTIONS if name in record}
        require_entries(record, ENTRIES | optional, remedy)
        require_entries(record["train"], {"steps": int, "seed": int}, remedy, "train.")
        for loss in record["losses"]:
            require_number("losses", loss, 0.0)
        model = from_dict(ModelConfig, record["model"])
        recorded: dict[str, Any] = {
            "model": to_dict(model),
            "first_document": record["first_document"],
            "train": record["train"],
        }
        expected: dict[str, Any] = {
            "model": to_dict(replace(self.model, vocab_size=model.vocab_size)),
            "first_document": self.first_document,
            "train": to_dict(self.train),
        }
        if version == 1:
            for settings in (recorded, expected):
                settings["train"] = {name: settings["train"][name] for name in ("steps", "seed")}
        else:
            recorded["train"] = to_dict(from_dict(TrainConfig, recorded["train"]))
        for name in ("masked", "silenced", "active"):
            recorded[name], expected[name] = sorted(record.get(name, {})), sorted(map(str, getattr(self, name)))
        recorded["by_domain"], expected["by_domain"] = "domain_use" in record, self.by_domain
        if self.corpus.kind in ("world", "inflected"):
            require_entries(record["corpus"], {"config": dict}, remedy, "corpus.")
            config = getattr(self.corpus, self.corpus.kind)
            recorded["corpus"] = to_dict(from_dict(type(config), record["corpus"]["config"]))
            expected["corpus"] = to_dict(config)
        elif self.corpus.sha256:
            recorded["sha256"], expected["sha256"] = record["corpus"].get("sha256"), self.corpus.sha256
        require_same(recorded, expected)


def read_job(path: Path) -> Job:
    """Read a job from YAML or JSON; `model` may be the name of a preset. Raises InputError naming what is wrong."""
    values = read_yaml(path)
    try:
        if isinstance(values.get("model"), str):
            values["model"] = to_dict(preset(values["model"]))
        return from_dict(Job, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def make_corpus(config: CorpusConfig) -> Corpus:
    """Make the corpus that a config names. Raises InputError if its text has another hash than the config's."""
    corpus = _make_corpus(config)
    found = corpus.fingerprint() if config.sha256 else {}
    remedy = f"this run has {config.sha256}: other text, or other versions of its packages"
    require(found.get("sha256", "") == config.sha256, f"sha256 of {corpus.name}", found.get("sha256"), remedy)
    return corpus


def _make_corpus(config: CorpusConfig) -> Corpus:
    if config.kind == "world":
        return World(config.world)
    if config.kind == "inflected":
        return Inflected(config.inflected)
    if config.kind == "stdlib":
        return Stdlib()
    if config.kind == "debian":
        return Debian()
    return Folder(Path(config.path)) if config.kind == "folder" else Hub(config.name)


def corpus_of(metadata: Mapping[str, Any]) -> Corpus:
    """Make the corpus that a model was trained on, from the metadata of its file.

    Raises InputError if the metadata does not locate the corpus: a folder, or a data set of the Hub.
    """
    corpus: Mapping[str, Any] = metadata.get("corpus", {})
    name = corpus.get("name")
    if name == "world":
        return World(from_dict(WorldConfig, corpus["config"]))
    if name == "inflected":
        return Inflected(from_dict(InflectedConfig, corpus["config"]))
    if name == "debian":
        return Debian()
    require(name == "stdlib", "corpus", name, "the model file does not locate this text; give a folder of text")
    return Stdlib()


def first_steps(job: Job, steps: int) -> Run:
    """Take the first `steps` steps of a run, exactly as in the full run; evaluate nothing and write nothing."""
    _, _, model, batches = _prepare(job, SINGLE_PROCESS)
    return train(model, batches, job.train, until=steps)


def run_job(
    job: Job, folder: Path | None = None, *, snapshots: Collection[int] = (), processes: Processes = SINGLE_PROCESS
) -> dict[str, Any]:
    """Train and evaluate a model; return the run's record.

    folder: the run folder, from which a stopped run resumes. It gets model.safetensors and record.json.
    snapshots: also save the model after each of these numbers of steps, as step<n>.safetensors; needs `folder`.
    processes: if many, all must call with the same job. Rank 0 gathers the trained model, evaluates it and returns the
    record. The others return an empty record without waiting for it.

    An interrupt raises KeyboardInterrupt after the current step; `folder` then has a checkpoint from which to resume.
    """
    for step in snapshots:
        require_int("snapshot", step, 1, job.train.steps)
    require(folder is not None or not snapshots, "snapshots", snapshots, "need a run folder")
    corpus, tokenizer, model, batches = _prepare(job, processes)
    heldout = heldout_batches(corpus, tokenizer, 64, job.train.seq_len, job.n_heldout_batches)
    metadata = {"corpus": corpus.fingerprint(), "tokenizer": tokenizer.to_str()}

    def save_snapshot(step: int) -> None:
        if folder is None or step not in snapshots:
            return
        path, full = folder / f"step{step}.safetensors", processes.gather_model(model)
        processes.on_rank0(lambda: save_model(path, cast(Transformer, full), **metadata))

    run = train(model, batches, job.train, folder=folder, after=save_snapshot, processes=processes)
    if run.steps_done < job.train.steps:
        raise KeyboardInterrupt
    full = processes.gather_model(model)
    if full is None:
        return {}
    if folder is not None:
        save_model(folder / "model.safetensors", full, **metadata)
    facts = {"first_document": job.first_document, "processes": processes.size}
    facts |= _evaluate(job, full, corpus, tokenizer, heldout)
    record = run_record(run, full, job.train, **facts)
    if folder is not None:
        write_json(folder / "record.json", record, flat=True)
    return record


def _evaluate(
    job: Job, model: Transformer, corpus: Corpus, tokenizer: Tokenizer, heldout: list[Batch]
) -> dict[str, Any]:
    """Measure held-out loss and recall of a trained model, and its held-out loss after the job's interventions."""

    def losses(changed: Transformer) -> dict[str, Any]:
        result = heldout_loss(changed, heldout, corpus.domains)
        return {"heldout_loss": result.loss, "heldout_by_domain": result.by_domain}

    result = heldout_loss(model, heldout, corpus.domains)
    recalls = recall(model, tokenizer, corpus.all_questions()) if isinstance(corpus, World) else {}
    facts: dict[str, Any] = {"corpus": corpus.fingerprint(), "vocab_size": tokenizer.get_vocab_size()}
    facts |= {"heldout_loss": result.loss, "heldout_by_domain": result.by_domain, "recall": recalls}
    facts["heldout_bits_per_byte"] = bits_per_byte(result, heldout, tokenizer, corpus.domains)
    if result.experts:
        facts["heldout_experts"] = [to_dict(layer) for layer in result.experts]
    if job.model.moe is not None and job.model.moe.n_shared_experts:
        with suppress(InputError):  # there may be no further routed experts, or a table that names none
            facts["shared_swapped"] = losses(swap_shared(model, job.model.moe.n_shared_experts))
        facts["shared_silenced"] = losses(silence(model, shared=True))
    if job.masked:
        facts["masked"] = {str(share): losses(mask_top(model, share)) for share in job.masked}
    if job.silenced:
        facts["silenced"] = {str(n): losses(silence(model, ranks=range(n))) for n in job.silenced}
    if job.by_domain:
        torch.manual_seed(job.train.seed)
        untrained = Transformer(model.config).to(model.embed.weight.device)
        after, before = (domain_use(one, heldout, len(corpus.domains)) for one in (model, untrained))
        facts["domain_use"] = {
            "trained": [to_dict(layer) for layer in after],
            "untrained": [layer.uncertainty for layer in before],
        }
    if job.active:
        facts["active"] = {str(k): losses(with_active(model, k)) for k in job.active}
    return facts


def _require_memory(config: ModelConfig, device: str, n_processes: int) -> None:
    """Require memory for the weights, and for each process's share of their gradients and AdamW's two moments."""
    counted = parameters(config)
    weights, memory = 4 * (counted.total + counted.mtp.total), memory_bytes(device)
    needed = weights + 3 * weights // n_processes
    remedy = (
        f"needs {needed / 1e9:,.1f} GB to train, and {device} has {(memory or 0) / 1e9:,.1f}: choose a smaller model"
    )
    require(memory is None or needed <= memory, "model", f"{parameters(config).total:,} parameters", remedy)


def _prepare(job: Job, processes: Processes) -> tuple[Corpus, Tokenizer, Transformer, Batches]:
    """Make corpus, tokenizer, the model before its first step, and its batches."""
    device = resolve_device(job.device)
    processes.join(device)
    processes.check_same(to_dict(job))
    corpus = make_corpus(job.corpus)
    text = processes.on_rank0(lambda: load_tokenizer(corpus, job.vocab_size).to_str())
    tokenizer = read_tokenizer(text)
    torch.manual_seed(job.train.seed)
    config = replace(job.model, vocab_size=tokenizer.get_vocab_size())
    _require_memory(config, device, processes.size)
    model = Transformer(config).to(device)
    processes.shard(model, job.expert_parallel)
    batches = Batches(corpus, tokenizer, job.train.batch_size, job.train.seq_len)
    try:
        batches.load_state_dict({"epoch": 0, "document": job.first_document, "offset": 0})
    except InputError:
        raise InputError(f"first_document = {job.first_document}: {corpus.name} has fewer documents") from None
    return corpus, tokenizer, model, batches
