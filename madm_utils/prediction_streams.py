"""Reading images ahead of the model and writing predictions behind it, in threads, within a bounded memory.

Pillow decodes and encodes without holding Python's lock, so that the model does not wait for either.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from madm_utils.cli import UserError
from madm_utils.prediction_files import Job, Picture, read_picture
from madm_utils.prediction_report import Report
from madm_utils.storage import Storage, Unwritable

if TYPE_CHECKING:
    from tqdm import tqdm

PIXELS_WAITING = 64_000_000
"""As many pixels may wait to be predicted, and as many to be written, one image being allowed whatever its size."""


def read_ahead(
    source: Storage, jobs: Sequence[Job], pool: ThreadPoolExecutor, number: int
) -> Iterator[tuple[Job, Picture | UserError]]:
    """Images in order, or why they cannot be read; `number` of them are read ahead, fewer when they are large."""
    waiting: deque[tuple[Job, Future[Picture]]] = deque()
    largest = 1

    def oldest() -> tuple[Job, Picture | UserError]:
        nonlocal largest
        job, future = waiting.popleft()
        try:
            picture = future.result()
        except UserError as error:
            return job, error
        largest = max(largest, picture.pixels.width * picture.pixels.height)
        return job, picture

    try:
        for job in jobs:
            waiting.append((job, pool.submit(read_picture, source, job.name)))
            while len(waiting) > min(number, PIXELS_WAITING // largest):
                yield oldest()
        while waiting:
            yield oldest()
    finally:
        for _, future in waiting:
            future.cancel()


class Writer:
    """Writes predictions in the background, and counts what became of each image.

    Args:
        target: output folder.
        threads: that encode and write.
        report: gets the counts.
        progress: gets a step for every image, and the messages.
    """

    def __init__(self, target: Storage, threads: int, report: Report, progress: "tqdm"):
        self._target, self._report, self._progress = target, report, progress
        self._limit = 4 * threads
        self._pool = ThreadPoolExecutor(threads)
        self._waiting: deque[tuple[Job, int, Future[None]]] = deque()
        self._pixels = 0

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Wait until everything has been written."""
        try:
            while self._waiting:
                self._settle()
            if kind is None:
                self._target.flush()
        except Unwritable as error:
            self._stop(error)
        finally:
            self._pool.shutdown()

    def write(self, job: Job, num_pixels: int, make: Callable[[], dict[str, bytes]]) -> None:
        """Have `make` give the files of an image of so many pixels, and write them; waits while too many wait."""
        while self._waiting and (
            self._waiting[0][2].done()
            or len(self._waiting) >= self._limit
            or self._pixels + num_pixels > PIXELS_WAITING
        ):
            self._settle()
        self._waiting.append((job, num_pixels, self._pool.submit(self._work, job, make)))
        self._pixels += num_pixels

    def fail(self, job: Job, reason: str) -> None:
        """Note that an image could not be predicted."""
        self._report.failed[job.name] = reason
        self._progress.write(f"error: {reason}", file=sys.stderr)
        self._progress.update()

    def _work(self, job: Job, make: Callable[[], dict[str, bytes]]) -> None:
        self._target.write(make(), job.replaces)

    def _settle(self) -> None:
        """Wait for the oldest image."""
        job, num_pixels, future = self._waiting.popleft()
        self._pixels -= num_pixels
        try:
            future.result()
        except Unwritable as error:
            self._stop(error)
        except UserError as error:
            self.fail(job, str(error))
        else:
            self._report.done += 1
            self._progress.update()

    def _stop(self, error: Unwritable) -> None:
        self._report.stopped = str(error)
        self._report.done -= sum(name.endswith("_label.png") for name in error.lost)
