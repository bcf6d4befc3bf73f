"""Read a page as a browser does, with the parser of the standard library."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "link", "img", "br", "source", "hr", "input"}
_LOADING = {"src", "srcset", "href", "action", "data", "poster", "background", "formaction", "xlink:href"}


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        tags: names of all elements, with their attributes.
        text: what is to be read, styles left out.
        headings: texts of h1 to h3.
        tables: cells of each table, by rows.
    """

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.headings: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], f"not closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.text += data
        if self._open and self._open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data
        elif "table" in self._open and ("td" in self._open or "th" in self._open):
            self.tables[-1][-1][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        """Attributes of the elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]

    def loads(self) -> list[str]:
        """Addresses of all that a browser would fetch, other than data and places on this page."""
        found = [value for _, attributes in self.tags for name, value in attributes.items() if name in _LOADING]
        found += re.findall(r"url\(([^)]*)\)|@import ([^;]*)", self.source)
        return [value for value in found if not value.startswith(("data:image/png;base64,", "#"))]

    def runs_code(self) -> list[str]:
        """Scripts, handlers of events, frames and plug-ins."""
        bad = {"script", "iframe", "object", "embed", "base", "form", "svg"}
        found = [tag for tag, _ in self.tags if tag in bad]
        return found + [name for _, attributes in self.tags for name in attributes if name.startswith("on")]
