"""Guidelines: Markdown becomes a tree of harmless elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lit_instruct.feedback.guidelines import parse_markdown, read_guidelines
from lit_instruct.types import ConfigError, DataError


def flat(nodes: list[Any]) -> str:
    """The tree as a line: ``p(a em(b))``."""
    return " ".join(node if isinstance(node, str) else f"{node['tag']}({flat(node['children'])})" for node in nodes)


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("# One\n\ntwo\nthree", "h1(One) p(two   three)"),
        ("- a\n- **b**\n", "ul(li(a) li(strong(b)))"),
        ("1. a\n\n   b", "ol(li(p(a) p(b)))"),
        ("`x<y` *z*", "p(code(x<y)   em(z))"),
        ("```\na <b>\n```", "pre(code(a <b>\n))"),
        ("> a\n\n---", "blockquote(p(a)) hr()"),
        ("|a|b|\n|-|-|\n|c|d|", "table(thead(tr(th(a) th(b))) tbody(tr(td(c) td(d))))"),
        ("<script>alert(1)</script>", "p(<script>alert(1)</script>)"),
        ('<img src=x onerror="alert(1)">', 'p(<img src=x onerror="alert(1)">)'),
        ("![a picture](http://example.org/x.png)", "p(a picture)"),
        ("[a](javascript:alert(1))", "p([a](javascript:alert(1)))"),
        ("[a](data:text/html,x)", "p([a](data:text/html,x))"),
        ("[a](/api/undo)", "p(a)"),
    ],
)
def test_markdown(text: str, tree: str) -> None:
    assert flat(parse_markdown(text)) == tree


def test_links_keep_their_address() -> None:
    (paragraph,) = parse_markdown("[a **b**](https://example.org/?q=1)")
    assert isinstance(paragraph, dict)
    (link,) = paragraph["children"]
    assert (link["tag"], link["href"], flat(link["children"])) == ("a", "https://example.org/?q=1", "a  strong(b)")


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "guidelines.md"
    file.write_bytes("\ufeff# \u00dcber\n".encode())
    assert flat(read_guidelines(file)) == "h1(\u00dcber)"
    file.write_bytes(b"a\xff")
    with pytest.raises(DataError, match=r"0xff[\s\S]*Do:"):
        read_guidelines(file)
    with pytest.raises(ConfigError, match=r"--guidelines: got [\s\S]*Do:"):
        read_guidelines(tmp_path)
