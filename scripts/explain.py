#!/usr/bin/env python3
"""Say, layer by layer, whether a bipolar network is its base network with other signs (docs/symmetry.md):

python scripts/explain.py activation=brelu network=cnn network.pool=max

It takes the options of scripts/train.py, builds the network without its values, and trains nothing.
"""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from bipolar import cli, sweep
from bipolar.errors import ConfigError


def report(cfg: DictConfig) -> str:
    """The table and what follows from it."""
    from bipolar import build  # imports torch, which --help can do without
    from bipolar.activations import BatchAxisReLU, Bipolar
    from bipolar.symmetry import SymmetryError, explain

    if cfg.twin:
        raise ConfigError("twin=true is not allowed here; leave it out to see whether the network equals its twin")
    model = build.hollow_network(cfg)
    if model is None:
        raise ConfigError(f"the samples' shape is not known for dataset={cfg.dataset.name}; choose another data set")
    try:
        rows = explain(model)
    except SymmetryError as error:
        raise ConfigError(str(error)) from error
    lines = [("layer", "operation", "symmetry", "reason")]
    lines += [(row.layer, row.operation, "keeps" if row.keeps else "breaks", row.reason) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    table = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]) for line in lines
    ]

    bases = [module.fn for module in model.modules() if isinstance(module, Bipolar)]
    names = sorted({getattr(base, "__name__", type(base).__name__) for base in bases})
    broken = [f"{row.layer} ({row.operation})" for row in rows if not row.keeps]
    if broken:
        count = "1 layer breaks" if len(broken) == 1 else f"{len(broken)} layers break"
        verdict = f"{count} the symmetry: {', '.join(broken)}."
    elif not bases and not any(isinstance(module, BatchAxisReLU) for module in model.modules()):
        verdict = "This network has no bipolar activation: it is a base network already."
    else:
        verdict = (
            f"This network is exactly its base network ({', '.join(names)}) with other signs: "
            "whatever it learns, that learns too."
        )
    return "\n".join([*table, "", verdict])


def main(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__.strip())
        return 0

    def job() -> None:
        flag = next((argument for argument in arguments if argument.startswith("-")), None)
        if flag is not None:
            raise ConfigError(f"there is no flag {flag}; options are written key=value, without dashes: see --help")
        print(report(sweep.compose(arguments)))

    # cli.main looks for flags of its own, such as -m, which explaining one network does not have
    return cli.main(job, [argument for argument in arguments if not argument.startswith("-")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
