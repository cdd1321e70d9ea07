"""Settings of the whole test run."""

import os
from pathlib import Path

import pytest

from madm_utils.cli import quiet_libraries

quiet_libraries()
# Two cores: threads that spin while they wait slow down everything that runs beside them, subprocesses included.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Goldens of the published code that belong to the repository."""
    return Path(__file__).parent / "fixtures"
