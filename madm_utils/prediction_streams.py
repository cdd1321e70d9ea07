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

MAX_PIXELS = 64_000_000
"""As many pixels may wait for the model, be in its hands, and wait to be written, each; one image always may."""


def read_ahead(
    source: Storage, jobs: Sequence[Job], pool: ThreadPoolExecutor, number: int
) -> Iterator[tuple[Job, Picture | UserError]]:
    """Images in order, or why they cannot be read.

    At most `number` of them are read ahead: one at first, more when their sizes are known and not too large.
    """
    waiting: deque[tuple[Job, Future[Picture]]] = deque()
    largest, taken = 1, 0

    def oldest() -> tuple[Job, Picture | UserError]:
        nonlocal largest, taken
        job, future = waiting.popleft()
        taken += 1
        try:
            picture = future.result()
        except UserError as error:
            return job, error
        except MemoryError:
            return job, UserError(f"{source.address(job.name)}: does not fit into memory")
        largest = max(largest, picture.pixels.width * picture.pixels.height)
        return job, picture

    try:
        for job in jobs:
            waiting.append((job, pool.submit(read_picture, source, job)))
            while len(waiting) > min(number, taken + 1, MAX_PIXELS // largest):
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
            self._waiting[0][2].done() or len(self._waiting) >= self._limit or self._pixels + num_pixels > MAX_PIXELS
        ):
            self._settle()
        self._waiting.append((job, num_pixels, self._pool.submit(self._work, job, make)))
        self._pixels += num_pixels

    def fail(self, job: Job, reason: str) -> None:
        """Note that an image could not be predicted; what is there from before is not of this image and goes."""
        try:
            self._target.write({}, job.earlier)
        except Unwritable as error:
            self._stop(error)
        except UserError as error:
            reason = f"{reason}; an earlier prediction of it is still there: {error}"
        self._report.failed[job.name] = reason
        self._progress.write(f"error: {reason}", file=sys.stderr)
        self._progress.update()

    def _work(self, job: Job, make: Callable[[], dict[str, bytes]]) -> None:
        self._target.write(make(), job.earlier)

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
        except MemoryError:
            self.fail(job, f"{self._target.address(job.output)}: its files do not fit into memory")
        else:
            self._report.done += 1
            self._progress.update()

    def _stop(self, error: Unwritable) -> None:
        self._report.stopped = str(error)
        self._report.done -= sum(name.endswith("_label.png") for name in error.lost)
