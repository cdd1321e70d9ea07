"""Stopping a run from outside: Ctrl-C, `kill`, a cluster that takes its machine back."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAME_REQUEST_SECONDS = 1.0
"""Launchers pass a signal on that the whole process group has got already; both copies are one request."""

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_IGNORED_BY_WORKERS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


class StopSignals:
    """While entered, the signals that ask to stop are noted instead of obeyed, so that a step can be finished.

    `received` is the number of the first one, `None` before. The same signal again, a second or more later, has its
    default effect at once.

    Args:
        preempt_signal: name without `SIG` of a further one, e.g. USR1, which a cluster sends some time before it ends
            a job; None for SIGTERM and SIGINT alone.
    """

    def __init__(self, preempt_signal: str | None = None):
        self._numbers = {*_STOP_SIGNALS, *([signal.Signals[f"SIG{preempt_signal}"]] if preempt_signal else [])}
        self.received: int | None = None
        self._first: dict[int, float] = {}
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in self._numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number
        if time.monotonic() - self._first.setdefault(number, time.monotonic()) > _SAME_REQUEST_SECONDS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While entered in the main thread, Ctrl-C is ignored: what ends worker processes must not end half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class LastingInterrupt:
    """While entered in the main thread, Ctrl-C cannot get lost: `check` raises it again.

    It is raised wherever the program happens to be, and compiled code in which exceptions end unseen drops it:
    numpy's `Generator.choice` does, and so does whatever closes a file that nobody refers to any more. A process that
    was started to ignore Ctrl-C goes on ignoring it.
    """

    def __init__(self):
        self._requested = False
        self._before: object = None

    def __enter__(self) -> "LastingInterrupt":
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._raise)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if Ctrl-C was pressed since entering."""
        if self._requested:
            raise KeyboardInterrupt

    def _raise(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        raise KeyboardInterrupt


def ignore_stop_signals(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: its workers go on, because a signal to the whole process group reaches them
    too, and the run needs them for the step that it is in. They end with the run."""
    for number in (number for number in signal.Signals if number.name in _IGNORED_BY_WORKERS):
        signal.signal(number, signal.SIG_IGN)
