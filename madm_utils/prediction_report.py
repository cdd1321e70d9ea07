"""What became of the images of `predict_madm.py`: counted by every process, put together and told by the main one."""

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")
_LISTED = 20
"""Failures that are printed; the summary file has all."""
_THREADS = 8


@dataclass
class Report:
    """What became of the images."""

    planned: int = 0
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    """Image -> why."""
    stopped: str = ""
    """Why nothing more could be written; empty while it could."""
    interrupted: int = 0
    """Number of the signal that ended the work."""
    missing: int = 0
    """Processes that ended before they could report."""

    @property
    def left(self) -> int:
        """Images that are still to be predicted."""
        return self.planned - self.done - len(self.failed)

    @property
    def status(self) -> str:
        """complete, interrupted or stopped."""
        if self.interrupted:
            return "interrupted"
        return "stopped" if self.stopped or self.missing else "complete"

    def add(self, other: "Report") -> None:
        """Count what another process did, too."""
        self.planned += other.planned
        self.done += other.done
        self.failed |= other.failed
        self.stopped = self.stopped or other.stopped
        self.interrupted = self.interrupted or other.interrupted

    def as_dict(self) -> dict[str, Any]:
        """For the summary file."""
        return {
            "status": self.status,
            "predicted": self.done,
            "failed": dict(sorted(self.failed.items())),
            "left": self.left,
            "stopped": self.stopped or None,
            "processes_without_report": self.missing,
        }

    def tell(self, skipped: int, where: str, who: str = "") -> int:
        """Print the summary; returns the exit code.

        Args:
            skipped: images that were done before.
            where: the output folder.
            who: the process, when it speaks for itself alone.
        """
        parts = [f"{who + ': ' if who else ''}{self.done} of {self.planned + skipped} images predicted"]
        parts += [f"{skipped} done before"] if skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{self.left} left"] if self.left else []
        print(f"{', '.join(parts)}: {where}", flush=True)
        if self.failed:
            shown = [self.failed[name] for name in sorted(self.failed)[:_LISTED]]
            more = [f"and {len(self.failed) - _LISTED} more (summary.json)"] if len(self.failed) > _LISTED else []
            print(f"{len(self.failed)} failed:", *shown, *more, sep="\n  ", file=sys.stderr)
        again = "the same command goes on where it stopped"
        if self.interrupted:
            print(f"stopped by {signal.Signals(self.interrupted).name}; {again}", file=sys.stderr)
            return 128 + self.interrupted
        if self.stopped:
            print(f"error: {self.stopped}; make room or give another --output_dir; {again}", file=sys.stderr)
        if self.missing:
            print(f"error: {self.missing} processes ended without a report; {again}", file=sys.stderr)
        return 1 if self.failed or self.stopped or self.missing else 0


class Processes:
    """The processes of one launch. They meet before the work and after it, not in between."""

    def __init__(self, accelerator: "Accelerator"):
        import torch

        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self.is_main = accelerator.is_main_process
        # A group of its own: by default the processes would wait for a slow one for some minutes only.
        forever = timedelta(days=365)
        self._group = torch.distributed.new_group(backend="gloo", timeout=forever) if self.count > 1 else None

    def from_main(self, make: Callable[[], Result]) -> Result:
        """What `make` gives in the main process, in all of them.

        Raises:
            UserError: in the main process the one of `make`; the others leave quietly.
        """
        import torch

        box: list[Any] = [None]
        try:
            box[0] = make() if self.is_main else None
        finally:
            if self._group is not None:
                torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        if box[0] is None:
            sys.exit(2)
        return box[0]

    def gather(self, report: Report) -> Report:
        """The sum of all reports, in every process; its own alone after a signal or when another has ended."""
        import torch

        if self._group is None:
            return report
        if report.interrupted:  # others may have much to do, and whoever sent the signal will not wait for them
            report.missing = self.count - 1
            return report
        reports: list[Report | None] = [None] * self.count
        try:
            torch.distributed.all_gather_object(reports, report, group=self._group)
        except RuntimeError:  # the connection to a process is lost
            report.missing = self.count - 1
            return report
        total = Report()
        for one in reports:
            total.add(one)
        return total

    def name(self) -> str:
        """E.g. `process 1 of 2`."""
        return f"process {self.index + 1} of {self.count}"

    def threads(self) -> int:
        """Threads for this process's files: its share of the machine's processors."""
        return max(1, min(_THREADS, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def leave(self) -> None:
        """Close what connects the processes."""
        import torch

        if self._group is not None:
            torch.distributed.destroy_process_group()
