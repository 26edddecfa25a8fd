"""Docstrings and comments as reStructuredText: paragraphs, `- ` lists, indented blocks, `code`, arXiv ids and links.

Everything else is escaped, so that no docstring can cause a warning of Sphinx.
"""

import re
from collections.abc import Callable, Iterator, Sequence

Resolve = Callable[[str], str | None]  # word between backticks -> full name of what it refers to
INLINE = re.compile(r"(?P<ticks>`+)(?P<code>.+?)(?P=ticks)|arXiv:(?P<arxiv>\d{4}\.\d{4,5})|(?P<url>https?://[^\s)>,]+)")
SPECIAL = re.compile(r"[\\*_|`@<>]")
BULLET = re.compile(r"( *)- +(?=\S)")
INDENT = 4  # least indentation of a block


def summary(text: str) -> str:
    """The first sentence of a docstring."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0].removesuffix(":")


def to_rst(text: str, resolve: Resolve) -> str:
    """Convert a docstring; each paragraph becomes one line. `resolve` finds what a word between backticks refers to."""
    return "\n\n".join(part for block in re.split(r"\n\s*\n", text.strip("\n")) for part in _block(block, resolve))


def inline(text: str, resolve: Resolve) -> str:
    """Convert one paragraph."""
    parts, end = [], 0
    for match in INLINE.finditer(text):
        parts += [escape(text[end : match.start()]), _marked(match, resolve)]
        end = match.end()
    return "\\ " + "".join([*parts, escape(text[end:])])  # behind "\ " nothing begins a list or a block


def escape(text: str) -> str:
    """Escape what RST would interpret; `->` becomes an arrow."""
    return SPECIAL.sub(r"\\\g<0>", text.replace("->", "→")).replace("::", ":\\:")


def _marked(match: re.Match[str], resolve: Resolve) -> str:
    if match["arxiv"]:
        return f"\\ `arXiv:{match['arxiv']} <https://arxiv.org/abs/{match['arxiv']}>`__\\ "
    if match["url"]:
        url = match["url"].rstrip(".")
        return f"\\ `{escape(url)} <{url}>`__\\ " + match["url"][len(url) :]
    code = match["code"].strip()
    target = resolve(code)
    return f"\\ :py:obj:`{code} <{target}>`\\ " if target else f"\\ ``{code}``\\ "


def _block(block: str, resolve: Resolve) -> Iterator[str]:
    """Convert the paragraphs, list items and indented blocks of lines without a blank line between them."""
    lines: Sequence[str] = block.splitlines()
    while lines:
        if part := _indented(lines):
            yield "\n".join([".. code-block:: text", "", *(f"   {line}" for line in _dedented(part))])
        elif part := _bullet(lines):
            yield "- " + inline(_joined(part).removeprefix("- "), resolve)
        else:
            part = _paragraph(lines)
            yield inline(_joined(part), resolve)
        lines = lines[len(part) :]


def _joined(lines: Sequence[str]) -> str:
    return " ".join(" ".join(lines).split())


def _width(line: str) -> int:
    return len(line) - len(line.lstrip())


def _dedented(lines: Sequence[str]) -> list[str]:
    least = min(_width(line) for line in lines)
    return [line[least:].rstrip() for line in lines]


def _indented(lines: Sequence[str]) -> Sequence[str]:
    """The leading lines that are indented."""
    end = next((at for at, line in enumerate(lines) if _width(line) < INDENT), len(lines))
    return lines[:end]


def _bullet(lines: Sequence[str]) -> Sequence[str]:
    """The first item of a list with the lines that continue it."""
    bullet = BULLET.match(lines[0])
    if not bullet:
        return []
    end = next((at for at, line in enumerate(lines[1:], 1) if _width(line) <= len(bullet[1])), len(lines))
    return lines[:end]


def _paragraph(lines: Sequence[str]) -> Sequence[str]:
    """The leading lines of a paragraph; a line that ends in a colon may be followed by a list or an indented block."""
    for at in range(1, len(lines)):
        if lines[at - 1].rstrip().endswith(":") and (_width(lines[at]) >= INDENT or BULLET.match(lines[at])):
            return lines[:at]
    return lines
