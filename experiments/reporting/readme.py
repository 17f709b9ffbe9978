"""The README's table of claims: made from the archives, as the report is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from bipolar.errors import ConfigError
from experiments.reporting import forest
from experiments.reporting.markdown import Claim, summary

BLOCK = re.compile(r"(<!-- claims: begin.*?-->\n).*?(<!-- claims: end.*?-->)", re.DOTALL)
PROFILES = ("cpu", "quick")
"""The README shows the first of these that has results."""


def shown_profile(results: Path) -> str:
    """The profile whose results the README shows, of those in `results`."""
    return next((name for name in PROFILES if any((results / name).glob("*/records.jsonl.xz"))), PROFILES[-1])


def text(readme: Path, folder: Path, claims: Sequence[Claim]) -> str:
    """The README with its block made anew from the claims of the profile whose results are in `folder`.

    Raises:
        ConfigError: the README has no such block.
    """
    old = readme.read_text(encoding="utf-8")
    if not BLOCK.search(old):
        raise ConfigError(f"{readme.name} has no block <!-- claims: begin --> ... <!-- claims: end -->")
    place = Path(os.path.relpath(folder, readme.parent)).as_posix()
    parts = [
        f"What came out, profile `{folder.name}` ([report]({place}/report.md), also as one page, "
        f"[report.html]({place}/report.html)):",
        summary(claims, f"{place}/report.md"),
    ]
    if any(claim.verdict.primary for claim in claims):
        parts.append(f"![{forest.CAPTION}]({place}/claims.png)\n\n{forest.CAPTION}")
    return BLOCK.sub(lambda match: f"{match[1]}\n" + "\n\n".join(parts) + f"\n\n{match[2]}", old)
