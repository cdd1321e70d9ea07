"""Reading raw event recordings as DSEC ships them: the events of a window, counted per pixel and rectified.

A recording is an `events.h5` (`events/{p,t,x,y}`, `ms_to_idx`, `t_offset`; Blosc-compressed) and a `rectify_map.h5`.
Event i happened at `t[i] + t_offset` microseconds; `ms_to_idx[ms]` is the first event with `t >= 1000 * ms`.
`rectify_map[y, x]` is the place (x, y) of a sensor pixel in the rectified picture.

Events are read in blocks of bounded size and counted per *sensor pixel*; the counts are rectified once, at the end.
All events of a pixel go to the same place, so this equals rectifying each event and costs nothing per event. Memory
does not depend on the length of the window. `np.add.at` into one array is faster here than `np.bincount` per block.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from madm_utils.cli import UserError
from madm_utils.raw_files import RawPath

if TYPE_CHECKING:
    import h5py

SENSOR_HEIGHT, SENSOR_WIDTH = 480, 640
PIXELS = SENSOR_HEIGHT * SENSOR_WIDTH
EVENTS_PER_BLOCK = 2**18
"""Events in memory at a time, about 5 MB: they stay in the cache of the processor."""
CHUNK_CACHE_BYTES = 8 * 2**20
"""Decompressed chunks that HDF5 keeps of each of the four event datasets; windows begin where the last one ended."""
EVENT_DATASETS = ("events/p", "events/t", "events/x", "events/y")


class Rectification:
    """Moves values per sensor pixel, (channels, 480 * 640), to where the pixels lie in the rectified picture."""

    def __init__(self, places: np.ndarray):
        """`places`: float (480, 640, 2), (x, y) of each sensor pixel; values that leave the picture are dropped."""
        self.x, self.y = (places[..., i].ravel().astype(np.float64) for i in range(2))

    @classmethod
    def none(cls) -> "Rectification":
        """Every pixel stays where it is."""
        y, x = np.mgrid[:SENSOR_HEIGHT, :SENSOR_WIDTH]
        return cls(np.stack([x, y], axis=2))

    def nearest(self, values: np.ndarray) -> np.ndarray:
        """Move each value to the nearest pixel (halves to the right and downwards)."""
        return np.stack([_scatter(self._nearest, plane) for plane in values])

    def bilinear(self, values: np.ndarray) -> np.ndarray:
        """Share each value among the four pixels around its place, by (1 - |dx|) (1 - |dy|)."""
        return np.stack([sum(_scatter(place, plane * w) for place, w in self._neighbors) for plane in values])

    @cached_property
    def _nearest(self) -> np.ndarray:
        return _flat_index(np.floor(self.x + 0.5), np.floor(self.y + 0.5))

    @cached_property
    def _neighbors(self) -> list[tuple[np.ndarray, np.ndarray]]:
        left, top = np.floor(self.x), np.floor(self.y)
        corners = [(left + dx, top + dy) for dy in (0, 1) for dx in (0, 1)]
        return [(_flat_index(x, y), (1 - np.abs(x - self.x)) * (1 - np.abs(y - self.y))) for x, y in corners]


class Recording:
    """An open recording. Indices count events; times are absolute microseconds."""

    def __init__(self, events: RawPath, rectify_map: RawPath | None, scratch: Path):
        """Open and check the recording; `open_recording` keeps it open from one window to the next."""
        self.events, self.rectify_map, self._scratch = events, rectify_map, scratch
        self._file: h5py.File | None = None
        self._unpacked: Path | None = None
        try:
            path = events.local_file(scratch)
            self._unpacked = path if events.member is not None else None
            self._file = _open_h5(path, events)
            self._datasets = {name[-1]: _dataset(self._file, name, events) for name in EVENT_DATASETS}
            lengths = {name: len(dataset) for name, dataset in self._datasets.items()}
            if len(set(lengths.values())) > 1:
                raise UserError(f"{events}: the event datasets differ in length ({lengths}); copy the file again")
            self.num_events = lengths["t"]
            with self._reading():
                self.t_offset = int(_dataset(self._file, "t_offset", events)[()])
                self._ms_to_idx = _dataset(self._file, "ms_to_idx", events)[:].astype(np.int64)
            self._check_index()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file, and delete it if it was unpacked from an archive."""
        if self._file is not None:
            self._file.close()
        if self._unpacked is not None:
            self._unpacked.unlink(missing_ok=True)

    @cached_property
    def rectification(self) -> Rectification:
        """The rectification that belongs to the recording; the identity when it has no map."""
        if self.rectify_map is None:
            return Rectification.none()
        path = self.rectify_map.local_file(self._scratch)
        try:
            with _open_h5(path, self.rectify_map) as file:
                dataset = _dataset(file, "rectify_map", self.rectify_map)
                if dataset.shape != (SENSOR_HEIGHT, SENSOR_WIDTH, 2):
                    raise UserError(
                        f"{self.rectify_map}: rectify_map has shape {dataset.shape}, expected "
                        f"{(SENSOR_HEIGHT, SENSOR_WIDTH, 2)}; take the file of the same sequence and camera"
                    )
                with _reading(self.rectify_map):
                    return Rectification(dataset[:])
        finally:
            if self.rectify_map.member is not None:
                path.unlink(missing_ok=True)

    def index_range(self, start_us: int, end_us: int) -> tuple[int, int]:
        """(first, stop) of the events with start <= time < end; empty outside the recording."""
        if start_us > end_us:
            raise UserError(f"{self.events}: the window from {start_us} to {end_us} us ends before it starts")
        return self._position(start_us, "left"), self._position(end_us, "left")

    def last_index(self, time_us: int) -> int:
        """CMDA's event index of a frame: the last event at or before the time, -1 outside the recording."""
        outside = not 0 <= (time_us - self.t_offset) // 1000 < len(self._ms_to_idx)
        return -1 if outside else self._position(time_us, "right") - 1

    def checked_range(self, event_range: tuple[int, int], start_us: int, end_us: int) -> tuple[int, int]:
        """(first, stop) of a window from `last_index(start_us)` to `last_index(end_us)`, which are checked."""
        expected = (self.last_index(start_us), self.last_index(end_us))
        if tuple(event_range) != expected:
            raise UserError(
                f"{self.events}: events {event_range[0]} to {event_range[1]} are given for {start_us} to {end_us} us, "
                f"but the recording has {expected[0]} to {expected[1]} there; the index file belongs to another "
                "recording: remove it, and the index is computed"
            )
        return max(event_range[0], 0), event_range[1] + 1

    def counts(self, first: int, stop: int, by_polarity: bool = False) -> np.ndarray:
        """Events per sensor pixel, int32 (1, 480 * 640); with `by_polarity` (2, ...): brighter, darker."""
        planes = 2 if by_polarity else 1
        total = np.zeros(planes * PIXELS, np.int32)
        for _, pixel, on in self._blocks(first, stop, with_polarity=by_polarity):
            if by_polarity:
                pixel += (on == 0) * np.int64(PIXELS)
            np.add.at(total, pixel, np.int32(1))
        return total.reshape(planes, PIXELS)

    def voxel(self, first: int, stop: int, bins: int) -> np.ndarray:
        """Sum of polarities (+1, -1) per time bin and sensor pixel, float64 (bins, 480 * 640).

        The first event lies in the first bin, the last one in the last, and one in between is shared by the two bins
        beside it in proportion to time.
        """
        total = np.zeros((bins + 1) * PIXELS)  # the last event has a neighbour of weight 0 behind the last bin
        if first < stop:
            begin, end = (int(self._times(i, i + 1)[0]) for i in (first, stop - 1))
        for t, pixel, on in self._blocks(first, stop, with_polarity=True):
            sign = on * 2.0 - 1
            if bins > 1:
                place = (t.astype(np.int64) - begin) * ((bins - 1) / max(end - begin, 1))
                lower = place.astype(np.int64)
                later = sign * (place - lower)
                pixel += lower * PIXELS
                np.add.at(total, pixel + PIXELS, later)
                sign -= later
            np.add.at(total, pixel, sign)
        return total.reshape(bins + 1, PIXELS)[:bins]

    def _blocks(self, first: int, stop: int, with_polarity: bool) -> Iterator[tuple[np.ndarray, ...]]:
        """Times, flat sensor pixels (int64) and, if wanted, polarities of consecutive blocks of the window.

        The pixels of a block are overwritten by the next.
        """
        buffer = np.empty(min(stop - first, EVENTS_PER_BLOCK), np.int64)
        previous = None
        for begin in range(first, stop, EVENTS_PER_BLOCK):
            end = min(begin + EVENTS_PER_BLOCK, stop)
            t = self._times(begin, end, previous)
            previous = t[-1]
            x, y = self._read("x", begin, end), self._read("y", begin, end)
            if x.max() >= SENSOR_WIDTH or y.max() >= SENSOR_HEIGHT:
                raise UserError(
                    f"{self.events}: an event between {begin} and {end} lies at x = {x.max()} or y = {y.max()}, "
                    f"outside the sensor of {SENSOR_WIDTH}x{SENSOR_HEIGHT}; the file is damaged or of another camera"
                )
            pixel = np.multiply(y, SENSOR_WIDTH, out=buffer[: end - begin], dtype=np.int64)
            pixel += x
            yield t, pixel, self._polarities(begin, end) if with_polarity else None

    def _polarities(self, begin: int, end: int) -> np.ndarray:
        p = self._read("p", begin, end)
        if p.max() > 1:
            raise UserError(f"{self.events}: polarity {p.max()} between events {begin} and {end}; expected 0 or 1")
        return p

    def _position(self, time_us: int, side: str) -> int:
        """Number of events before (`left`) or until (`right`) a time."""
        relative = time_us - self.t_offset
        ms = relative // 1000
        if ms < 0:
            return 0
        if ms >= len(self._ms_to_idx):
            return self.num_events
        begin = int(self._ms_to_idx[ms])
        end = int(self._ms_to_idx[ms + 1]) if ms + 1 < len(self._ms_to_idx) else self.num_events
        # One event more on the left: it shows whether the index points to the first event of the millisecond.
        before = min(begin, 1)
        t = self._times(begin - before, end)
        if (before and t[0] >= ms * 1000) or (begin < end and not ms * 1000 <= t[before] <= t[-1] < (ms + 1) * 1000):
            raise UserError(
                f"{self.events}: ms_to_idx[{ms}] = {begin} is not the first event of millisecond {ms}; "
                "the file is damaged, copy it again"
            )
        return begin + int(np.searchsorted(t[before:], relative, side))

    def _check_index(self) -> None:
        index = self._ms_to_idx
        inside = not index.size or (index[0] >= 0 and index[-1] <= self.num_events and np.all(index[:-1] <= index[1:]))
        covered = not self.num_events or self._times(self.num_events - 1, self.num_events)[0] < index.size * 1000
        if not (inside and covered):
            raise UserError(
                f"{self.events}: ms_to_idx does not fit the {self.num_events} events (it must rise, and reach the "
                "last one); the file is damaged, copy it again"
            )

    def _times(self, begin: int, end: int, previous: int | None = None) -> np.ndarray:
        """`t` of events `begin` to `end - 1`, checked not to fall, also from the `previous` time."""
        t = self._read("t", begin, end)
        if t.size and ((previous is not None and t[0] < previous) or np.any(t[1:] < t[:-1])):
            raise UserError(
                f"{self.events}: timestamps are out of order between events {begin} and {end}; the file is damaged or "
                "was not sorted by time"
            )
        return t

    def _read(self, name: str, begin: int, end: int) -> np.ndarray:
        with self._reading():
            return self._datasets[name][begin:end]

    def _reading(self) -> AbstractContextManager[None]:
        return _reading(self.events)


_open_recordings: dict[int, Recording] = {}
"""Process id -> the recording that it holds open. A forked child must not use, close or delete its parent's."""


def open_recording(events: RawPath, rectify_map: RawPath | None, scratch: Path) -> Recording:
    """Open a recording, or return it if it is the one that this process opened last.

    A recording that lies in an archive is unpacked to `scratch` and deleted when the next one is opened, so that a
    process needs room for one. `close_recording` deletes the last.
    """
    recording = _open_recordings.get(os.getpid())
    if recording is None or (recording.events, recording.rectify_map) != (events, rectify_map):
        close_recording()
        recording = _open_recordings[os.getpid()] = Recording(events, rectify_map, scratch)
    return recording


def close_recording() -> None:
    """Close the recording that this process holds open, if there is one."""
    recording = _open_recordings.pop(os.getpid(), None)
    if recording is not None:
        recording.close()


def _open_h5(path: Path, source: RawPath) -> "h5py.File":
    try:
        import h5py
    except ImportError:
        raise UserError(f"{source}: reading HDF5 needs two packages: pip install h5py hdf5plugin") from None
    try:
        import hdf5plugin  # noqa: F401  registers Blosc
    except ImportError:
        pass  # `_dataset` says so if the file needs it: HDF5_PLUGIN_PATH may provide the filter as well
    try:
        # Nothing is written, and many network file systems cannot lock.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=CHUNK_CACHE_BYTES)
    except OSError as error:
        if "truncated" in str(error):
            raise UserError(f"{source} is truncated ({error}); copy or download it again") from None
        raise UserError(f"{source} cannot be opened as an HDF5 file ({error}); copy or download it again") from None


def _dataset(file: "h5py.File", name: str, source: RawPath) -> "h5py.Dataset":
    """A dataset of the file, checked to be there and to have filters that can be undone."""
    import h5py

    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        found: list[str] = []
        file.visit(found.append)
        raise UserError(f"{source} holds no dataset '{name}'; found {', '.join(found[:20]) or 'nothing'}")
    filters = dataset.id.get_create_plist()
    for i in range(filters.get_nfilters()):
        code, _, _, title = filters.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise UserError(
                f"{source}: '{name}' is compressed with {title.decode() or code}, which this HDF5 cannot read; "
                "pip install hdf5plugin"
            )
    return dataset


@contextmanager
def _reading(source: RawPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{source} is damaged ({error}); copy or download it again") from None


def _flat_index(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pixel number of whole coordinates; `PIXELS` for those outside the picture or not finite."""
    inside = (x >= 0) & (x < SENSOR_WIDTH) & (y >= 0) & (y < SENSOR_HEIGHT)
    return np.where(inside, np.where(inside, y, 0) * SENSOR_WIDTH + np.where(inside, x, 0), PIXELS).astype(np.int64)


def _scatter(place: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum of the values that go to each pixel, (480 * 640,), in their own type."""
    total = np.zeros(PIXELS + 1, values.dtype)
    np.add.at(total, place, values)
    return total[:PIXELS]
