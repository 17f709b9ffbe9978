"""What the machine can do: devices, precisions, threads."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from bipolar.errors import ConfigError, check_choice, check_int
from bipolar.workers import cores

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def choose_device(device: str) -> torch.device:
    """`auto`: CUDA, else Apple's MPS, else the CPU."""
    check_choice("device", device, DEVICES)
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise ConfigError(f"device={device!r} is not on this machine; choose from auto, {there}")
    return torch.device(device)


def choose_precision(precision: str, device: torch.device) -> str:
    """`auto`: bfloat16 where the hardware multiplies it, else float32."""
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 products in hardware: NVIDIA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return False


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def set_threads(threads: int | None) -> int:
    """Use `threads` threads on the CPU; None for what the environment allows. Returns the number in use."""
    if threads is None:
        # A worker of a parallel sweep gets its share of the cores in OMP_NUM_THREADS; torch may have been set to
        # another number by an earlier job in the same process.
        allowed = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(allowed) if allowed.isdigit() and int(allowed) > 0 else cores()
    torch.set_num_threads(check_int("threads", threads))
    return torch.get_num_threads()


def keep_memory() -> None:
    """Let this process keep the memory of freed tensors for the next ones, where its C library is glibc.

    glibc gives large blocks back to the system and gets them anew, page by page, in every training step: of an
    activation of 32 MiB that is two thirds of the time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MALLOPT_MMAP_MAX, 0)
        libc.mallopt(MALLOPT_TRIM_THRESHOLD, 2**31 - 1)


MALLOPT_TRIM_THRESHOLD, MALLOPT_MMAP_MAX = -1, -4  # from malloc.h
