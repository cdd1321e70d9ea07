"""Worker processes of the preparation and the verification, which end when and how they should."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from madm_utils.cli import UserError
from madm_utils.interruption import uninterrupted

SPAWN = multiprocessing.get_context("spawn")
"""Not forked: the libraries that read and write Arrow files have threads of their own."""
_held: tuple[Any, Any] | None = None
"""In a worker process: what it was given, and the event that ends the work before its end."""


@contextmanager
def worker_pool(num_proc: int, state: Any) -> Iterator[ProcessPoolExecutor]:
    """Pool of `num_proc` processes that each hold `state` (`worker_state`); on leaving, all of them have ended.

    Work that asks `stopped` between its steps ends at once when the main process leaves early, and workers end
    themselves when the main process was killed.

    Raises:
        UserError: a worker was ended from outside.
    """
    stop, broken = SPAWN.Event(), False
    pool = ProcessPoolExecutor(num_proc, SPAWN, _start, (state, stop))
    try:
        yield pool
    except BrokenProcessPool:
        broken = True
        raise UserError(
            "a worker process was ended from outside, perhaps for want of memory; what is finished is kept: run the "
            "same command again with a smaller --num_proc"
        ) from None
    finally:
        # A shutdown that Ctrl-C breaks off leaves the executor waiting for its workers for ever.
        with uninterrupted():
            if not broken:  # a worker that was killed may hold the event's lock
                stop.set()
            pool.shutdown(cancel_futures=True)


def worker_state() -> Any:
    """What `worker_pool` was given, in one of its processes."""
    return _held[0]


def stopped() -> bool:
    """Whether the main process wants no more of this worker."""
    return _held[1].is_set()


def _start(state: Any, stop: Any) -> None:
    global _held
    _held = (state, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers in order,
    parent = multiprocessing.parent_process()
    # and when it was killed, they end themselves.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
