"""Settings of the whole test run."""

import os
from pathlib import Path

import pytest

from madm_utils.cli import quiet_libraries

quiet_libraries()
# Two cores: threads that spin while they wait slow down everything that runs beside them, subprocesses included.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


# Files that take minutes, longest first: with two workers, one that starts late would run alone at the end.
SLOW = ("reference_parity", "resume", "engines", "train_madm", "distributed", "several_tasks", "hub", "standalone",
        "demo_app", "eval_madm", "export_madm", "predict_madm", "original_checkpoint", "report")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow files; the order inside a file stays."""
    order = {f"test_{name}.py": k for k, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Goldens of the published code that belong to the repository."""
    return Path(__file__).parent / "fixtures"
