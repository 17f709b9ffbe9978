#!/usr/bin/env python3
"""Measure ratios (benchmarks/) and write them to results/bench/<machine>/:

python scripts/benchmark.py                           # all; with nothing else running
python scripts/benchmark.py recurrent activations     # some
python scripts/benchmark.py --quick --out try         # a smoke test
"""

import argparse
import importlib
import sys
from pathlib import Path

from benchmarks import GROUPS
from bipolar.errors import ConfigError, check_choice, check_int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"from {', '.join(GROUPS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="few small cases, few repeats: no figures to quote")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="where the machine's folder goes")
    parser.add_argument("--repeats", type=int, help="pairs of samples per case")
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args()
    try:
        for name in args.groups:
            check_choice("group", name, GROUPS)
        for name in ("repeats", "threads"):
            if getattr(args, name) is not None:
                check_int(name, getattr(args, name))
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")

    from benchmarks import report, timing  # imports torch, which --help can do without
    from bipolar.device import keep_memory, set_threads

    keep_memory()  # as every run does, for both sides
    threads = set_threads(args.threads)
    limits = timing.limits(args.quick)
    made = []
    for group in args.groups or GROUPS:
        for case in importlib.import_module(f"benchmarks.{group}").cases(args.quick):
            repeats = args.repeats or (1 if args.quick else 9)
            set_threads(threads)  # a run that was measured may have set another number
            made.append(timing.measure(group, case, limits, repeats, 0.0 if args.quick else 0.02))
            print(report.line(made[-1]), flush=True)
    folder = report.write(args.out, made, limits, threads, args.quick)
    print(f"wrote {folder}/bench.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
