"""Guidelines for labelers: Markdown as a tree of a few elements, which the page builds itself. HTML stays text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_instruct.types import ConfigError, DataError

Node = str | dict[str, Any]
"""A text, or ``{"tag": name, "children": [nodes]}`` with ``"href"`` for a link."""

_TAGS = {"h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "strong", "em", "code", "pre", "blockquote", "hr", "br", "a"}
_TAGS |= {"table", "thead", "tbody", "tr", "th", "td"}
_SCHEMES = ("https://", "http://", "mailto:")


def read_guidelines(path: Path) -> list[Node]:
    """Read a Markdown file (CommonMark and tables).

    Args:
        path: of the file.

    Returns:
        The nodes of the page; pictures are left as their descriptions.

    Raises:
        ConfigError: the file cannot be read.
        DataError: it is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--guidelines: got {path}, which cannot be read ({error}).\nDo: check the path.") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path}: got byte 0x{byte:02x}; need UTF-8.\nDo: save it as UTF-8.") from error
    return parse_markdown(text)


def parse_markdown(text: str) -> list[Node]:
    """Turn Markdown into nodes."""
    from markdown_it import MarkdownIt
    from markdown_it.tree import SyntaxTreeNode

    tokens = MarkdownIt("commonmark", {"html": False}).enable("table").parse(text)
    return _children(SyntaxTreeNode(tokens))


def _children(node: Any) -> list[Node]:
    nodes: list[Node] = []
    for child in node.children:
        nodes += _nodes(child)
    return nodes


def _nodes(node: Any) -> list[Node]:
    if node.type == "text":
        return [node.content] if node.content else []
    if node.type == "softbreak":
        return [" "]
    if node.type in ("code_inline", "fence", "code_block"):
        code: Node = {"tag": "code", "children": [node.content]}
        return [code if node.type == "code_inline" else {"tag": "pre", "children": [code]}]
    if node.type == "image":
        return [node.content]
    children = _children(node)
    if node.tag not in _TAGS or node.hidden:  # hidden: the paragraphs of a tight list
        return children
    if node.tag == "a":
        href = str(node.attrs.get("href", ""))
        return [{"tag": "a", "href": href, "children": children}] if href.lower().startswith(_SCHEMES) else children
    return [{"tag": node.tag, "children": children}]
