"""Experiments: one file per claim, which reads finished runs and makes its figures, its table and its verdict.

The runs come from `configs/experiment/<profile>/<claim>.yaml`, and from further parts of the same claim,
`<claim>-<part>.yaml`; the file `<claim>.py` here says what is made of them. It has

    a docstring          the title in the first line, then the claim and what would count for and against it
    figure(runs)         the main figure (matplotlib); the first paragraph of its docstring is caption and alt text
    more_figures         optional: further figures, name -> function like `figure`
    table(runs)          rows, each a dictionary with the same keys: one row per line of the table; the first paragraph
                         of its docstring explains the table
    verdict(runs)        a Verdict (`analysis/inference.py`), by a rule fixed before the runs

and nothing that trains. Runs are `bipolar.runs.Run`, read from a claim's archive. A claim's
file is all that is written for it; what claims share is in `analysis/`, and what makes archives and reports of them in
`reporting/`.
"""

from collections.abc import Iterable

ORDER = ["mean_shift", "stability", "deep_mlp", "cnn", "deep_rnn", "normalization", "batch_axis", "symmetry", "resnet"]
"""Claims as the report lists them."""


def ordered(claims: Iterable[str]) -> list[str]:
    """Names of claims in the report's order; those that `ORDER` does not know come last, by name."""
    return sorted(claims, key=lambda claim: (ORDER.index(claim) if claim in ORDER else len(ORDER), claim))


def claim_of(experiment: str) -> str:
    """`cnn` for the experiments `cnn`, `cnn-twins` and `cpu/cnn-twins`."""
    return experiment.rpartition("/")[2].partition("-")[0]


def part_of(experiment: str) -> str:
    """`twins` for the experiment `cpu/cnn-twins`; an empty text for `cpu/cnn`."""
    return experiment.rpartition("/")[2].partition("-")[2]
