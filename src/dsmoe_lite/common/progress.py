"""Progress bars for terminals and notebooks, which leave nothing in stored outputs."""

import os
from collections.abc import Iterable
from typing import Any


def progress(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm over `items`, or a bar to update by hand. TQDM_DISABLE=1 silences it, in notebooks too."""
    from tqdm.auto import tqdm

    options.setdefault("leave", False)
    if os.environ.get("TQDM_DISABLE"):
        options["disable"] = True
    return tqdm(items, **options)
