"""A Hugging Face dataset, streamed. It needs the network and the optional package `datasets`."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any

from dsmoe_lite.common.errors import InputError
from dsmoe_lite.common.paths import install_command
from dsmoe_lite.data.corpus import Document, require_split

HELDOUT_EVERY = 10  # one row in ten is held out
HASHED_ROWS = 100


class Hub:
    """The text column of a dataset: one document per row, all in domain "text"; every tenth row is held out.

    `options` go to `datasets.load_dataset`, such as data_files or revision.
    Raises InputError if `datasets` is not installed, or if the dataset or the column does not exist.
    """

    name = "hub"
    domains = ("text",)

    def __init__(
        self, dataset: str, *, subset: str | None = None, column: str = "text", part: str = "train", **options: Any
    ) -> None:
        self._title, self._column = dataset, column
        self._source = {"dataset": dataset, "subset": subset, "column": column, "part": part, **options}
        try:
            import datasets
        except ModuleNotFoundError:
            raise InputError(f"dataset = {dataset!r}: needs the package datasets: {install_command('hub')}") from None
        try:
            self._rows = datasets.load_dataset(dataset, subset, split=part, streaming=True, **options)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"dataset = {dataset!r}: cannot be loaded: {reason}") from None

    def documents(self, split: str, start: int = 0) -> Iterator[Document]:
        """Yield the rows of a split, from number `start` on; the dataset skips the others."""
        require_split(split)
        heldout = split == "heldout"
        first = start * HELDOUT_EVERY if heldout else start + start // (HELDOUT_EVERY - 1)
        for row, values in enumerate(self._rows.skip(first), first):
            if (row % HELDOUT_EVERY == HELDOUT_EVERY - 1) == heldout:
                yield Document(self._text(values), "text")

    def fingerprint(self) -> dict[str, Any]:
        """The arguments, and the sha256 and length of the first rows."""
        texts = [self._text(values) for values in islice(self._rows, HASHED_ROWS)]
        digest = hashlib.sha256(repr((self._source, texts)).encode()).hexdigest()
        return {"name": self.name, "sha256": digest, "characters": sum(map(len, texts)), "source": dict(self._source)}

    def _text(self, values: dict[str, Any]) -> str:
        text = values.get(self._column)
        if not isinstance(text, str):
            columns = ", ".join(values)
            raise InputError(f"column = {self._column!r}: holds no text in {self._title}: its columns are {columns}")
        return text
