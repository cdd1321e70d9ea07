"""Freed memory stays with the process: counted in pages that the system has to hand out again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource
import torch
from madm_utils.cpu_memory import keep_freed_memory

print(keep_freed_memory())
for _ in range(10):  # until the C library has found its place for it
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_freed_memory_is_kept_unless_the_environment_decides(environment):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**inherited, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    assert kept == str(not environment)
    assert (int(faults) < 100) == (not environment)
