"""What a run asks of the machine."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_STEPS = """
import resource, torch
from bipolar.device import keep_memory
if {keep}:
    keep_memory()
def steps(count):
    for _ in range(count):
        torch.zeros(2**24).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = steps(20)
print(steps(10) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other ways")
def test_freed_memory_serves_the_next_step():
    """64 MiB are 16384 pages; each that is new to the process is a fault."""

    def faults(keep):
        code = FAULTS_OF_STEPS.format(keep=keep)
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

    assert faults(False) > 1000
    assert faults(True) < 100
