"""The page of every key of a config file for `dsmoe train`, from the dataclasses that read it."""

import dataclasses
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

from dsmoe_lite.book.api_source import read_module
from dsmoe_lite.common.paths import NOTEBOOKS
from dsmoe_lite.config import AttentionConfig, MLAConfig, ModelConfig, MoEConfig
from dsmoe_lite.config.attention import YarnConfig
from dsmoe_lite.data.inflected import InflectedConfig
from dsmoe_lite.data.world import WorldConfig
from dsmoe_lite.training.config import TrainConfig
from dsmoe_lite.training.job import CorpusConfig, Job

WIDTH = 74  # columns of code that the book shows without scrolling
PAGE = NOTEBOOKS / "pages" / "train_settings.md"
PARTS: list[tuple[str, type, str]] = [  # path in the file, its dataclass, what it is
    ("", Job, "The keys of the file itself."),
    ("model", ModelConfig, "A mapping of these keys, or the name of a preset, such as `course-deepseekmoe`."),
    ("model.attention", AttentionConfig, "Multi-head or grouped-query attention."),
    ("model.attention", MLAConfig, "Multi-head latent attention, if `kv_lora_rank` is given."),
    ("model.attention.yarn", YarnConfig, "YaRN's extension of the context."),
    ("model.moe", MoEConfig, "Experts and router. Without it, the model is dense."),
    ("train", TrainConfig, "The training run."),
    ("corpus", CorpusConfig, "The text. A folder of your own: `{kind: folder, path: my_texts}`."),
    ("corpus.world", WorldConfig, "The made-up world of facts."),
    ("corpus.inflected", InflectedConfig, "The made-up language with inflections."),
]
HEAD = """\
# Every setting of a training run

`dsmoe train FILE.yml` reads these keys; a key that is left out has the value shown. A key without a value must be
given. An unknown key is refused with the nearest known one. For a start, `model: course-deepseekmoe`,
`train: {steps: 200}` and `corpus: {kind: folder, path: my_texts}` are enough: a folder of text files, each subfolder a
domain.

This page is generated from the dataclasses that read the file.
"""


def page() -> str:
    """The text of the page."""
    return "\n".join([HEAD, *(_part(path, cls, text) for path, cls, text in PARTS)])


def _part(path: str, cls: type, text: str) -> str:
    lines = [_line(field, _comments(cls).get(field.name, "")) for field in dataclasses.fields(cls)]
    title = f"`{path}`" if path else "Top level"
    return f"## {title}\n\n{text}\n\n{inspect.getdoc(cls)}\n\n```yaml\n" + "\n".join(lines) + "\n```\n"


def _line(field: Any, comment: str) -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        value = ""
    elif dataclasses.is_dataclass(default):
        value, comment = "{}", comment or "below"
    else:
        value = json.dumps(default)
    key = f"{field.name}: {value}".rstrip()
    line = f"{key}  # {' '.join(comment.split())}" if comment else key
    if len(line) <= WIDTH:
        return line
    return "\n".join([*textwrap.wrap(comment, WIDTH, initial_indent="# ", subsequent_indent="# "), key])


def _comments(cls: type) -> dict[str, str]:
    """The comment of each field, from the source."""
    source = Path(inspect.getfile(cls))
    module = read_module(source.read_text(encoding="utf-8"), cls.__module__, source.name)
    (found,) = (name for name in module.names if name.name == cls.__name__)
    return {member.name: member.text for member in found.members}
