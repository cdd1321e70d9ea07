"""How long a training waits for its data, and what to do about it."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.logging import get_logger

logger = get_logger(__name__)

_TOO_MUCH = 0.1
"""Fraction of the time from which on a warning says what to do."""


class LoaderWait:
    """Counts the seconds that pass between asking a data loader for a batch and having it.

    Args:
        workers: loader processes of the run, for the warning.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self.waited = 0.0
        """Seconds waited since the last `fraction`."""
        self._paused = 0.0
        self._warned = False

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """`batches`, with the time counted that passes until each is there."""
        batches, end = iter(batches), object()
        while True:
            started = time.monotonic()
            batch = next(batches, end)
            self.waited += time.monotonic() - started
            if batch is end:
                return
            yield batch

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block is none of training: validation, checkpoints."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - started

    def fraction(self, waited: float, passed: float, starting: bool) -> float:
        """Fraction of the training time that was waited, 0 to 1; counting begins anew.

        Args:
            waited: seconds, of this process or of the one that waited longest.
            passed: seconds since the last call, pauses included.
            starting: the loader's processes started in that time, which is no reason to warn.
        """
        fraction = min(1.0, waited / max(passed - self._paused, 1e-9))
        self.waited = self._paused = 0.0
        if fraction > _TOO_MUCH and not starting and not self._warned:
            self._warned = True
            logger.warning(
                f"training waits for its data {fraction:.0%} of the time: raise --dataloader_num_workers "
                f"({self.workers}), or keep --data_dir on a faster disk"
            )
        return fraction
