"""A Sphinx extension for the API reference: no typographic quotes, no search for types of other packages."""

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

from dsmoe_lite.book.api import FOLDER
from dsmoe_lite.book.api_source import PACKAGE

PARAMETERS = re.compile(r'(?<=<span class="sig-paren">\(</span>)\s*<dl>(.*?)</dl>\s*', re.DOTALL)


class PlainReference(SphinxTransform):
    """Keep the quotes, primes and dashes of docstrings; remove the links of types such as `int` and `Tensor`.

    For each of those thousands of types Sphinx would search all names, which takes as long as the rest of the build.
    """

    default_priority = 1  # before SmartQuotes

    def apply(self, **_: Any) -> None:
        """Change one document."""
        if not self.env.docname.startswith(f"{FOLDER}/"):
            return
        self.document.settings.smart_quotes = False
        for link in list(self.document.findall(pending_xref)):
            if link.get("refdomain") == "py" and not link["reftarget"].startswith(PACKAGE):
                link.replace_self(nodes.Text(link["reftarget"]))


def mark_up_parameters(_: Any, page: str, template: str, context: dict[str, Any], __: Any) -> None:
    """Replace the list of parameters of a long signature, which has no terms: screen readers reject such a list."""
    if page.startswith(f"{FOLDER}/"):
        context["body"] = PARAMETERS.sub(_parameters, context["body"])


def _parameters(match: re.Match[str]) -> str:
    items = match[1].replace("<dd>", '<span class="api-parameter">').replace("</dd>", "</span>")
    return items.strip().replace("\n", "")


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_transform(PlainReference)
    app.connect("html-page-context", mark_up_parameters)
    return {"parallel_read_safe": True}
