"""What a run ran on: versions, commit, machine, command."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torchvision", "numpy", "hydra-core", "omegaconf", "hydra-joblib-launcher", "joblib", "wandb",
    "scikit-learn", "scipy", "statsmodels", "matplotlib",
)  # fmt: skip
CODE = ("bipolar", "configs", "experiments", "scripts")


@cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def commit() -> dict[str, Any]:
    """The commit of the code; `dirty`: a hash of what was changed against it, None for a clean tree; that change."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=True, timeout=20
        ).stdout

    try:
        diff = git("diff", "HEAD", "--", *CODE)
        for name in git("ls-files", "--others", "--exclude-standard", "--", *CODE).splitlines():
            text = (root / name).read_text(encoding="utf-8", errors="replace")
            diff += f"new file {name}\n" + "".join(f"+{line}\n" for line in text.splitlines())
        head = git("rev-parse", "HEAD").strip()
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None, "diff": ""}
    return {"commit": head, "dirty": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None, "diff": diff}


def processor() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    return {"platform": f"{platform.system()} {platform.machine()}", "processor": processor(), "cores": os.cpu_count()}


def command() -> str:
    """The command line, the program's path relative to the current folder."""
    program = sys.argv[0]
    if Path(program).is_absolute() and Path(program).is_relative_to(Path.cwd()):
        program = str(Path(program).relative_to(Path.cwd()))
    return shlex.join(["python", program, *sys.argv[1:]])


def describe(device: Any, precision: str, threads: int) -> dict[str, Any]:
    """The content of a run's environment.json."""
    import torch

    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "command": command(),
        "commit": commit()["commit"],
        "dirty": commit()["dirty"],
        "versions": versions(),
        "machine": machine(),
        "device": str(device),
        "accelerator": accelerator,
        "precision": precision,
        "threads": threads,
    }
