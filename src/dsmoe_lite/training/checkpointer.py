"""The checkpoints of a run: lock its folder, check its settings, restore and save its state."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from dsmoe_lite.common.errors import require
from dsmoe_lite.common.schema import require_entries
from dsmoe_lite.config import to_dict
from dsmoe_lite.data.batches import Batches
from dsmoe_lite.model import Transformer
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.processes import Processes
from dsmoe_lite.training.record import Run
from dsmoe_lite.training.run_folder import check_settings, lock

STATE = {"losses": list, "routing": list, "seconds": float, "cpu_seconds": float, "tokens": int, "batches": dict}


class Checkpointer:
    """Resumes a run from its folder and saves checkpoints there; without a folder it starts anew and saves nothing.

    As a context manager, it locks the folder. Every method is collective.
    """

    def __init__(
        self,
        folder: Path | None,
        model: Transformer,
        optimizer: torch.optim.AdamW,
        batches: Batches,
        config: TrainConfig,
        processes: Processes,
    ) -> None:
        self._folder, self._model, self._optimizer = folder, model, optimizer
        self._batches, self._config, self._processes = batches, config, processes
        self._lock = ExitStack()

    def __enter__(self) -> "Checkpointer":
        folder = self._folder
        if folder is not None:
            self._processes.on_rank0(lambda: self._lock.enter_context(lock(folder)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.close()

    def resume(self) -> Run:
        """Restore the newest checkpoint, if there is one, and return the run so far.

        Raises InputError if the folder holds a run with other settings, or a checkpoint that does not fit.
        """
        torch.manual_seed(self._config.seed)
        run = Run() if self._folder is None else self._restore(self._folder)
        self._processes.seed_rank(run.steps_done)
        return run

    def save_if_due(self, run: Run, *, last: int, stopped: bool) -> None:
        """Save a checkpoint after the `last` step, if training was stopped, and every checkpoint_every steps."""
        every = self._config.checkpoint_every
        due = stopped or run.steps_done == last or (every and run.steps_done % every == 0)
        if self._folder is not None and due:
            state = vars(run) | {"batches": self._batches.state_dict()}
            self._processes.save(self._folder, run.steps_done, self._model, self._optimizer, state)

    def _restore(self, folder: Path) -> Run:
        model, processes = self._model, self._processes
        settings = {
            "model": to_dict(model.config),
            "train": to_dict(self._config),
            "data": self._batches.describe(),
        }
        processes.check_same(settings)
        processes.on_rank0(lambda: check_settings(folder, settings))
        state = processes.load(folder, model, self._optimizer)
        if state is None:
            return Run()
        known = isinstance(state, dict) and state.keys() == {"batches", *vars(Run())}
        remedy = "another version of dsmoe-lite wrote it; resume with that version, or choose another folder"
        require(known, "checkpoint", str(folder), remedy)
        require_entries(state, STATE, remedy, f"{folder}: checkpoint: ")
        self._batches.load_state_dict(state.pop("batches"))
        return Run(**state)
