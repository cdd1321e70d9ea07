"""Pictures of raw events: which events, and how they become a picture.

The edge pictures that the published MADM system trains on are shared by its authors; how they were made is not
published. The representation `edge` approximates them: where enough happened, white on black, without polarity.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from madm_utils.cli import UserError
from madm_utils.event_recording import SENSOR_HEIGHT, SENSOR_WIDTH, Recording, open_recording
from madm_utils.raw_files import RawPath

DEFAULT_CLIPS = {"edge": 3.0, "count": 10.0, "polarity": 5.0, "voxel": 1.5}
REPRESENTATIONS = tuple(DEFAULT_CLIPS)
VOXEL_CLIP_EVENTS = 500_000
ZERO_CELL = 1e-9
"""A voxel cell below this is empty: weights that cancel leave a rest of rounding."""


@dataclass(frozen=True)
class EventSettings:
    """How a window of events becomes a picture.

    - `edge`: white where at least `clip` events fell on a pixel, else black. 3 is about twice the mean of a 50 ms
      window in city traffic. An approximation of MADM's target images, whose recipe is unpublished.
    - `count`: events per pixel, `clip` events are white.
    - `polarity`: as `count`, brighter events in red, darker ones in blue.
    - `voxel`: the event tensor of CMDA in [-1, 1], see `normalize_voxel`; in an 8-bit picture the mean of its bins,
      0 is grey.

    The first three rectify to the nearest pixel, so counts stay whole numbers (where the map stretches the picture, in
    DSEC by a few percent near the corners, single pixels receive nothing); `voxel` rectifies bilinearly as published.
    """

    representation: str = "edge"
    window_ms: float | None = None
    """Milliseconds before the frame; `None`: since the previous frame."""
    clip: float | None = None
    """See the representations; `None`: 3, 10, 5 and 1.5 in their order."""
    bins: int = 1
    """Time bins of `voxel`."""
    rectify: bool = True

    def __post_init__(self) -> None:
        if self.representation not in REPRESENTATIONS:
            raise UserError(f"unknown event representation '{self.representation}'; give {', '.join(REPRESENTATIONS)}")
        for name, value in (("window", self.window_ms), ("clip", self.clip)):
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"the event {name} must be positive, got {value}")
        if self.bins < 1 or (self.bins > 1 and self.representation != "voxel"):
            raise UserError(
                f"{self.bins} event bins for '{self.representation}': give at least 1, more than 1 only for 'voxel'"
            )

    @property
    def limit(self) -> float:
        """`clip`, or the default of the representation."""
        return DEFAULT_CLIPS[self.representation] if self.clip is None else self.clip


@dataclass(frozen=True)
class EventWindow:
    """One picture that is to be made from a recording."""

    events: RawPath
    rectify_map: RawPath | None
    """`None`: the events are not rectified."""
    start_us: int
    end_us: int
    """Absolute microseconds as the timestamp files give them; the window holds start <= time < end."""
    settings: EventSettings = EventSettings()
    height: int | None = None
    """Rows kept from the top; `None`: all 480."""
    event_range: tuple[int, int] | None = None
    """(first, last) event, both belong to the window, instead of those between the two times."""

    def load(self, scratch: Path) -> Image.Image:
        """8-bit picture: grey, or RGB for `polarity`. `info["num_events"]` says how many events it shows.

        A window without events is black (`voxel`: grey).

        Args:
            scratch: folder for a recording that lies in an archive; see `open_recording`.

        Raises:
            UserError: the recording cannot be read, or its events are not what they should be.
        """
        values, num_events = self._planes(scratch)
        if self.settings.representation == "polarity":
            on, off = _to_8_bit(values)
            pixels = np.stack([on, np.zeros_like(on), off], axis=2)
        elif self.settings.representation == "voxel":
            pixels = _to_8_bit((values.mean(axis=0) + 1) / 2)
        else:
            pixels = _to_8_bit(values[0])
        picture = Image.fromarray(pixels)
        picture.info["num_events"] = num_events
        return picture

    def load_tensor(self, scratch: Path) -> Image.Image:
        """The same as float32 in [0, 1] (`voxel`: [-1, 1]) in mode F, bins (`polarity`: on, off) below each other."""
        values, num_events = self._planes(scratch)
        picture = Image.fromarray(values.astype(np.float32, copy=False).reshape(-1, SENSOR_WIDTH))
        picture.info["num_events"] = num_events
        return picture

    def identity(self) -> list:
        """What the picture depends on, for fingerprints; can be written as JSON."""
        settings = asdict(replace(self.settings, clip=self.settings.limit))
        sizes = [self.events.size, self.rectify_map.size if self._rectified else None]
        window = [self.start_us, self.end_us, list(self.event_range) if self.event_range else None]
        return [*sizes, *window, self.height, settings]

    def __str__(self) -> str:
        events = f", events {self.event_range[0]} to {self.event_range[1]}" if self.event_range else ""
        return f"{self.events} ({self.start_us} to {self.end_us} us{events})"

    @property
    def _rectified(self) -> bool:
        return self.settings.rectify and self.rectify_map is not None

    def _planes(self, scratch: Path) -> tuple[np.ndarray, int]:
        """(channels, height, 640) of the representation, see `represent`, and the number of events."""
        recording = open_recording(self.events, self.rectify_map if self._rectified else None, scratch)
        if self.event_range is None:
            first, stop = recording.index_range(self.start_us, self.end_us)
        else:
            first, stop = recording.checked_range(self.event_range, self.start_us, self.end_us)
        values = represent(recording, first, stop, self.settings)
        return values[:, : self.height], stop - first


def represent(recording: Recording, first: int, stop: int, settings: EventSettings) -> np.ndarray:
    """(channels, 480, 640) of events `first` to `stop - 1`, as `EventWindow.load_tensor` tells; `edge` is bool."""
    limit = settings.limit
    if settings.representation == "voxel":
        voxel = recording.rectification.bilinear(recording.voxel(first, stop, settings.bins))
        values = normalize_voxel(voxel, stop - first, limit)
    else:
        counts = recording.counts(first, stop, by_polarity=settings.representation == "polarity")
        counts = recording.rectification.nearest(counts)
        values = counts >= limit if settings.representation == "edge" else np.minimum(counts / np.float32(limit), 1)
    return values.reshape(-1, SENSOR_HEIGHT, SENSOR_WIDTH)


def normalize_voxel(voxel: np.ndarray, num_events: int, clip: float) -> np.ndarray:
    """CMDA's normalisation of an event tensor, of any shape, to [-1, 1].

    Cells that are not empty are standardised over all bins; then positive values are cut at
    c = clip * (num_events - 1) / 500000 and divided by their maximum, negative ones likewise. Empty cells stay 0.

    Where no value of a sign is left, nothing is divided and that sign is 0; the published code yields -1 everywhere
    when no negative value is left, which takes a window with hardly any event.
    """
    filled = np.abs(voxel) > ZERO_CELL
    values = voxel[filled]
    if not values.size:
        return np.zeros_like(voxel)
    mean = values.mean()
    deviation = np.sqrt(max((values**2).mean() - mean**2, 0))
    standard = (values - mean) / deviation if deviation > ZERO_CELL else np.zeros_like(values)
    bound = clip * (num_events - 1) / VOXEL_CLIP_EVENTS
    positive, negative = np.clip(standard, 0, bound), np.clip(standard, -bound, 0)
    result = np.zeros_like(voxel)
    result[filled] = positive / (positive.max() or 1) - negative / (negative.min() or 1)
    return result


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1], or bool -> uint8, rounded."""
    if values.dtype == bool:
        return values * np.uint8(255)
    return (values * np.float32(255) + np.float32(0.5)).astype(np.uint8)
