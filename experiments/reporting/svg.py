"""Matplotlib's SVG files made part of a page that may be light or dark."""

from __future__ import annotations

import html
import re

STYLE = re.compile(r'style="([^"]*)"')
COLOUR = re.compile(r"#([0-9a-fA-F]{6})")


def inline(svg: str, prefix: str, label: str) -> str:
    """An <svg> element for HTML.

    Greys are taken as ink of so much coverage: black becomes the page's text colour, white becomes nothing, the grey
    of grid lines a thin veil of the text colour. The background is thus the page's.

    Args:
        svg: a file as matplotlib writes it.
        prefix: put before every id, so that ids differ between the figures of a page.
        label: what assistive technology reads.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would rule the whole page
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-")
    svg = STYLE.sub(lambda match: f'style="{_inked(match[1])}"', svg)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="([^"]*)"', head)
    if box is None:
        raise ValueError("the SVG file has no viewBox")
    width = 4 / 3 * float(box[1].split()[2])  # points to CSS pixels
    named = f'role="img" aria-label="{html.escape(label)}"'
    look = f'fill="currentColor" stroke-linejoin="round" stroke-linecap="butt" style="max-width:{width:.0f}px"'
    links = 'xmlns:xlink="http://www.w3.org/1999/xlink"' if "xlink:" in rest else ""
    return re.sub(r"\n\s*", "\n", f'<svg viewBox="{box[1]}" {links} {named} {look}>{rest}').strip()


def _inked(style: str) -> str:
    """CSS declarations with each grey replaced by the text colour and an opacity."""
    pairs = [declaration.partition(":") for declaration in style.split(";") if ":" in declaration]
    declared = {name.strip(): value.strip() for name, _, value in pairs}
    for name in ("fill", "stroke"):
        colour = COLOUR.fullmatch(declared.get(name, ""))
        if colour is None:
            continue
        channels = bytes.fromhex(colour[1])
        if max(channels) - min(channels) > 8:
            continue
        coverage = (1 - sum(channels) / 3 / 255) * float(declared.get(f"{name}-opacity", 1))
        declared[name] = "currentColor" if coverage >= 0.005 else "none"
        declared[f"{name}-opacity"] = f"{coverage:.3g}"
    return "; ".join(f"{name}: {value}" for name, value in declared.items())
