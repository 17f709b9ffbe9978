#!/usr/bin/env python3
"""Make figures, tables, verdicts and report of a profile anew from the archived runs in results/<profile>/ alone.

python scripts/report.py --profile quick

python scripts/report.py --profile quick --check     # write nothing; exit status 1 if anything is out of date
"""

import argparse
import sys
from pathlib import Path

from bipolar.errors import ConfigError, nearest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quick", help="a folder of --results")
    parser.add_argument("--results", default="results", help="where the results are")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw at the same time")
    parser.add_argument("--check", action="store_true", help="write nothing, say what is out of date")
    args = parser.parse_args()
    root = Path(args.results)
    profiles = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if args.profile not in profiles:
        there = f"there are {', '.join(profiles)}" if profiles else "there are none"
        hint = nearest(args.profile, profiles)
        parser.exit(2, f"error: --profile={args.profile} has no folder in {root}; {there}{hint}\n")

    from experiments.reporting import report  # imports matplotlib

    results = root / args.profile
    try:
        if args.check:
            wrong = report.check(args.profile, results)
            print("\n".join(wrong) if wrong else f"{results} is what its records and the code make")
            return 1 if wrong else 0
        files = report.write(args.profile, results, report.command_of(args.profile, results), args.workers)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {results}/report.md and {len(files) - 1} other files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
