"""Link the first use of each word of the glossary in a chapter to its definition, which is also the link's tooltip.

The chapters are plain text: no author marks a word, and JupyterLab shows no markup.
"""

import functools
import re
from typing import Any

from docutils import nodes

CHAPTER = re.compile(r"\d\d_")
NOT_IN = (nodes.title, nodes.literal, nodes.literal_block, nodes.reference, nodes.math, nodes.math_block, nodes.raw)


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def link_terms(app: Any, doctree: Any, page: str) -> None:
    """Replace the first use of each term by a link, if `page` is a chapter and the book has a glossary."""
    left = _definitions(app) if CHAPTER.match(page) else {}
    for node in list(doctree.findall(nodes.Text)):
        if left and not _inside(node, NOT_IN):
            node.parent.replace(node, _linked(str(node), left, app.builder, page))


def _definitions(app: Any) -> dict[str, tuple[str, str, str]]:
    """The page, the anchor and the definition of each term."""
    terms = {name: place for (kind, name), place in app.env.domaindata["std"]["objects"].items() if kind == "term"}
    found = {}
    for page in {page for page, _ in terms.values()}:
        for item in app.env.get_doctree(page).findall(nodes.definition_list_item):
            definition = item.next_node(nodes.definition).astext()
            for term in item.findall(nodes.term):
                found[term.astext()] = (page, term["ids"][0], definition)
    return found


def _inside(node: Any, kinds: tuple[type, ...]) -> bool:
    while node is not None and not isinstance(node, kinds):
        node = node.parent
    return node is not None


def _linked(text: str, left: dict[str, tuple[str, str, str]], builder: Any, page: str) -> list[Any]:
    """`text` as nodes, with links for the terms in it, which are then removed from `left`."""
    made: list[Any] = []
    while uses := [(match.start(), -len(term), term, match) for term in left if (match := use(term).search(text))]:
        *_, term, match = min(uses, key=lambda use: use[:2])
        target, anchor, definition = left.pop(term)
        uri = f"{builder.get_relative_uri(page, target)}#{anchor}"
        link = nodes.reference("", match[0], internal=True, refuri=uri, reftitle=definition, classes=["term"])
        made += [nodes.Text(text[: match.start()]), link]
        text = text[match.end() :]
    return [*made, nodes.Text(text)]


@functools.cache
def use(term: str) -> re.Pattern[str]:
    """A term as a sentence may write it: with a capital or in the plural, unless it is an acronym."""
    words = re.escape(term).replace(r"\ ", r"\s+")
    if term != term.lower():
        return re.compile(rf"\b{words}\b")
    return re.compile(rf"\b[{term[0]}{term[0].upper()}]{words[1:]}(?:s|es)?\b")
