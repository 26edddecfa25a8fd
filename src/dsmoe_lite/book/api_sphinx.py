"""A Sphinx extension for the API reference: no typographic quotes, no search for types of other packages."""

from typing import Any

from docutils import nodes  # type: ignore[import-untyped]
from sphinx.addnodes import pending_xref
from sphinx.transforms import SphinxTransform

from dsmoe_lite.book.api import FOLDER
from dsmoe_lite.book.api_source import PACKAGE


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


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.add_transform(PlainReference)
    return {"parallel_read_safe": True}
