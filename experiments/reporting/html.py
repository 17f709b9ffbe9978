"""`report.html`: the same Markdown as one page that needs no other file, network or script."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from experiments.analysis import inference
from experiments.reporting import svg
from experiments.reporting.markdown import slug

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST_SVG = 400_000
"""In bytes; a figure with more is put into the page as PNG."""
SHORT = 30
"""Up to so many characters a table's cell is not broken into lines."""
BADGES = {
    inference.SUPPORTED: "supported",
    inference.CONTRADICTED: "contradicted",
    inference.NO_DIFFERENCE: "none",
    inference.NOT_TESTED: "untested",
}


def page(markdown: str, folder: Path) -> str:
    """The page for a report in Markdown, whose images are looked for in `folder`."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(markdown)
    headings = _name_headings(tokens)
    tokens = _with_figures(tokens, folder)
    _style_tables(tokens)
    _style_verdicts(tokens)
    body = parser.renderer.render(tokens, parser.options, {})
    # the contents go behind the title and the line below it
    first = body.index("<h2")
    title = next(_text(tokens[index + 1]) for index, token in enumerate(tokens) if token.tag == "h1")
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body=body[:first] + _contents(headings) + body[first:])


def _name_headings(tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """Give second-level headings the anchors that GitHub gives them; returns anchors and texts."""
    headings = []
    for index, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            text = _text(tokens[index + 1])
            token.attrSet("id", slug(text))
            headings.append((slug(text), text))
    return headings


def _contents(headings: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><a href="#{anchor}">{html.escape(text)}</a></li>\n' for anchor, text in headings)
    return f'<nav aria-label="Contents">\n<p>Contents</p>\n<ul>\n{items}</ul>\n</nav>\n'


def _text(inline: Token) -> str:
    return "".join(child.content for child in inline.children or [])


def _with_figures(tokens: list[Token], folder: Path) -> list[Token]:
    """Each paragraph that is just an image, and the paragraph with its caption, as one <figure>."""
    result: list[Token] = []
    index = number = 0
    while index < len(tokens):
        children = tokens[index + 1].children or [] if tokens[index].type == "paragraph_open" else []
        if len(children) != 1 or children[0].type != "image":
            result.append(tokens[index])
            index += 1
            continue
        number += 1
        source, label = str(children[0].attrs["src"]), _text(children[0])
        caption = tokens[index + 4] if index + 4 < len(tokens) else None
        has_caption = caption is not None and tokens[index + 1].content == f"![{caption.content}]({source})"
        result.append(_block(f"<figure>\n{_scrolling(_image(folder / source, label, f'f{number}'), 'figure')}"))
        if has_caption:
            result += [_block("<figcaption>"), caption, _block("</figcaption>\n")]  # type: ignore[list-item]
        result.append(_block("</figure>\n"))
        index += 6 if has_caption else 3
    return result


def _image(path: Path, label: str, prefix: str) -> str:
    vector = path.with_suffix(".svg")
    if vector.stat().st_size <= LARGEST_SVG:
        return svg.inline(vector.read_text(encoding="utf-8"), prefix, label)
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{content}">'


def _scrolling(content: str, what: str) -> str:
    """`content` in a box of its own that scrolls sideways, by keyboard too."""
    return f'<div class="scroll" role="group" aria-label="{what}" tabindex="0">\n{content}\n</div>\n'


def _style_tables(tokens: list[Token]) -> None:
    """Wrap tables, and code, in scrolling boxes; columns of short cells keep to one line."""
    index = 0
    while index < len(tokens):
        token = tokens[index]
        if token.type in ("table_open", "fence"):
            end = index if token.type == "fence" else _end(tokens, index)
            before, after = _scrolling("\0", "table" if token.type == "table_open" else "commands").split("\0")
            tokens.insert(end + 1, _block(after))
            tokens.insert(index, _block(before))
            index += 1
        if token.type in ("td_open", "th_open") and len(_text(tokens[index + 1])) <= SHORT:
            token.attrSet("class", "short")
        index += 1


def _end(tokens: Sequence[Token], start: int) -> int:
    return next(index for index in range(start, len(tokens)) if tokens[index].type == "table_close")


def _style_verdicts(tokens: Sequence[Token]) -> None:
    """Make a badge of each bold text that begins as a verdict does."""
    for token in tokens:
        children = token.children or []
        for opening, content in pairwise(children):
            if opening.type == "strong_open":
                kind = next((badge for text, badge in BADGES.items() if content.content.startswith(text)), None)
                if kind:
                    opening.attrSet("class", f"verdict {kind}")


def _block(content: str) -> Token:
    token: Any = Token("html_block", "", 0)
    token.content = content
    return token
