#!/usr/bin/env python3
"""Run what is missing of a profile's experiments, then write results/<profile>/.

    python scripts/reproduce.py --profile quick

    python scripts/reproduce.py --profile quick --results try trainer.max_steps=20     # to try something out

    python scripts/reproduce.py --profile cpu --from-archive     # make only what the archives in results/cpu lack

Each experiment is the grid of `train.py -m experiment=<profile>/<claim>`, or `<claim>-<part>` for a further part of a
claim. All of them are run as one sweep; runs that are finished are not repeated, those that grids share are made once,
and where nothing is missing nothing is done. The runs of a claim are archived in results/<profile>/<claim>/, and the
report is made from the archives (as scripts/report.py does).
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from bipolar import cli, workers
from bipolar.environment import command
from bipolar.errors import ConfigError, nearest
from bipolar.runs import is_done, read_run, reuse, run_folder
from bipolar.sweep import CONFIGS, expand
from experiments import claim_of
from experiments.reporting import provenance

ROOT = CONFIGS.parent
EXPERIMENTS = CONFIGS / "experiment"


def main() -> int:
    profiles = sorted(path.name for path in EXPERIMENTS.iterdir() if path.is_dir())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="quick", help=f"one of {', '.join(profiles)}")
    parser.add_argument("--workers", type=int, default=2, help="processes that train at the same time")
    parser.add_argument("--output-root", default="outputs", help="where the run folders are")
    parser.add_argument("--results", default="results", help="where the results go")
    parser.add_argument("--from-archive", action="store_true", help="take over the runs that are archived in --results")
    parser.add_argument("overrides", nargs="*", help="options of every run, as for train.py; need a --results")
    args = parser.parse_args()
    if args.profile not in profiles:
        hint = nearest(args.profile, profiles)
        parser.exit(2, f"error: --profile={args.profile} is not there; choose from {', '.join(profiles)}{hint}\n")
    if args.workers < 1:
        parser.exit(2, f"error: --workers={args.workers} is not allowed; give an integer of at least 1\n")

    if args.overrides and args.results == parser.get_default("results"):
        parser.exit(2, "error: with other options these are not the profile's results; give a folder: --results\n")

    started = time.monotonic()
    if args.workers > 1 and not (Path(args.output_root) / args.profile).exists():
        workers.prepare()  # there is something to do
    parts = sorted(path.stem for path in (EXPERIMENTS / args.profile).glob("*.yaml"))
    for part in parts:
        if not (ROOT / "experiments" / f"{claim_of(part)}.py").exists():
            parser.exit(2, f"error: {part}.yaml has no experiments/{claim_of(part)}.py that reads its runs\n")
    results = Path(args.results) / args.profile
    if args.from_archive:
        from experiments.reporting import records

        try:
            archives = sorted(path.parent for path in results.glob(f"*/{records.RECORDS}"))
            taken = sum(records.restore(archive, Path(args.output_root)) for archive in archives)
        except ConfigError as error:
            parser.exit(2, f"error: {error}\n")
        print(f"{taken} runs taken over from the archives in {results}", flush=True)
    claims: dict[str, list[Path]] = {}
    jobs: dict[str, DictConfig] = {}  # by run id: what several grids share is made once
    for part in parts:
        grid = expand([f"experiment={args.profile}/{part}", f"output_root={args.output_root}", *args.overrides])
        folders = [run_folder(cfg) for cfg in grid]
        claims.setdefault(claim_of(part), []).extend(folders)
        for folder in folders:
            reuse(folder)
        to_do = {folder.name: cfg for folder, cfg in zip(folders, grid, strict=True) if not is_done(folder)}
        if to_do:
            print(f"{args.profile}/{part}: {len(to_do)} of {len(folders)} runs to do", flush=True)
        for name, cfg in to_do.items():
            jobs.setdefault(name, cfg)
    if jobs:
        try:
            status = cli.run_jobs(list(jobs.values()), args.workers)
        except ConfigError as error:
            parser.exit(2, f"error: {error}\n")
        if status > 128:
            return status  # asked to stop; what was running is saved
    folders = [folder for members in claims.values() for folder in members]
    for folder in folders:
        reuse(folder)
    missing = sum(not is_done(folder) for folder in folders)
    if missing:
        print(
            f"no report: {missing} of {len(folders)} runs are not finished; the same command goes on", file=sys.stderr
        )
        return 1

    if provenance.is_current(results, folders):
        print(f"nothing to do: all {len(folders)} runs are finished and {results}/report.md is made from them")
        return 0

    from experiments.reporting import report  # imports matplotlib

    try:
        archive = [partial(_archive, results / claim, members) for claim, members in claims.items()]
        archive.sort(key=lambda task: -len(task.args[1]))
        workers.run_all(archive, args.workers)
        report.write(args.profile, results, command(), args.workers)
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {results}/report.md from {len(folders)} runs ({time.monotonic() - started:.0f} s)")
    return 0


def _archive(target: Path, folders: list[Path]) -> None:
    from experiments.reporting import records

    records.write(target, [read_run(folder) for folder in folders])


if __name__ == "__main__":
    sys.exit(main())
