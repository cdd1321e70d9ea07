"""Event recordings simulated from the procedural scenes, in the files and folders of DSEC.

A camera looks at one street scene (`madm_utils.scenes`), turns and moves forward; a pixel fires whenever the logarithm
of its brightness has changed by its threshold, and at random. Recordings lie in the distorted picture of the sensor,
images and labels in the rectified one, as in DSEC. Everything is a function of the seed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from madm_utils.dsec import FIRST_NIGHT_FRAME, LABEL_ROWS, NIGHT_LAST_TEST_FRAMES
from madm_utils.event_recording import PIXELS, SENSOR_HEIGHT, SENSOR_WIDTH
from madm_utils.label_spaces import CITYSCAPES_CLASSES, STREET_CLASSES
from madm_utils.scenes import render_scene, scene_seed

FRAME_US = 50_000
"""Labels and images of DSEC come 20 times a second."""
STEP_US = 10_000
"""Brightness is computed this often; the crossings between are interpolated."""
MARGIN = (48, 64)
"""Pixels (vertical, horizontal) of scene around the view, for its motion."""
THRESHOLD = 0.2
"""Change of the logarithm that makes an event."""
NOISE_RATE = 0.5
"""Random events per pixel and second."""
DARK = 0.02
"""Added to the brightness before the logarithm: the sensor sees no change in the dark."""
FIRST_TIMESTAMP_US = 55_000_000_000
EVENTS_PER_CHUNK = 2**16

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Some events in the order of time: t (uint32, microseconds since the recording began), x, y (uint16), p (uint8)."""


def lens_map() -> np.ndarray:
    """Rectification map of the simulated lens, float32 (480, 640, 2): where each sensor pixel lies, (x, y)."""
    y, x = np.mgrid[:SENSOR_HEIGHT, :SENSOR_WIDTH].astype(np.float64)
    x, y = (x - SENSOR_WIDTH / 2) / SENSOR_WIDTH, (y - SENSOR_HEIGHT / 2) / SENSOR_WIDTH
    stretch = 1 + 0.08 * (x**2 + y**2)
    turned_x, turned_y = x - 0.008 * y, y + 0.008 * x
    places = [
        (turned_x * stretch + 0.5) * SENSOR_WIDTH + 1.3,
        turned_y * stretch * SENSOR_WIDTH + SENSOR_HEIGHT / 2 - 0.7,
    ]
    return np.stack(places, axis=2).astype(np.float32)


@dataclass(frozen=True)
class MovingView:
    """The rectified view of a moving camera on one scene; times in seconds."""

    seed: int
    brightness: float = 1.0

    def picture(self, time: float) -> np.ndarray:
        """RGB, uint8 (480, 640, 3)."""
        x, y = self._inside(*np.meshgrid(*self._axes(time)))
        return (self._scene[0][y.astype(int), x.astype(int)] * self.brightness + 0.5).astype(np.uint8)

    def label(self, time: float) -> np.ndarray:
        """Ids of `STREET_CLASSES`, uint8 (480, 640)."""
        x, y = self._inside(*np.meshgrid(*self._axes(time)))
        return self._scene[1][y.astype(int), x.astype(int)]

    def sensor_brightness(self, time: float) -> np.ndarray:
        """Brightness in [0, 1] per pixel of the distorted sensor, float32 (480 * 640,), bilinear."""
        x, y = self._scene_places(time, self._lens[..., 0].ravel(), self._lens[..., 1].ravel())
        x, y = self._inside(x, y)
        column, row = x.astype(np.int32), y.astype(np.int32)
        dx, dy = x - column, y - row
        light, width = self._light, self._scene[0].shape[1]
        corner = row * width + column
        upper = light[corner] * (1 - dx) + light[corner + 1] * dx
        lower = light[corner + width] * (1 - dx) + light[corner + width + 1] * dx
        return (upper * (1 - dy) + lower * dy) * np.float32(self.brightness)

    @cached_property
    def _scene(self) -> tuple[np.ndarray, np.ndarray]:
        return render_scene(self.seed, "rgb", SENSOR_HEIGHT + 2 * MARGIN[0], SENSOR_WIDTH + 2 * MARGIN[1])

    @cached_property
    def _light(self) -> np.ndarray:
        return (self._scene[0] @ np.array([0.299, 0.587, 0.114], np.float32) / 255).astype(np.float32).ravel()

    @cached_property
    def _lens(self) -> np.ndarray:
        return lens_map()

    def _axes(self, time: float) -> tuple[np.ndarray, np.ndarray]:
        x, y = np.arange(SENSOR_WIDTH, dtype=np.float32), np.arange(SENSOR_HEIGHT, dtype=np.float32)
        return self._scene_places(time, x, y)

    def _scene_places(self, time: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where places of the rectified view lie in the scene."""
        zoom = np.float32(1 - 0.06 * np.sin(1.7 * time))
        turn, nod = np.float32(40 * np.sin(3.1 * time)), np.float32(10 * np.sin(5.3 * time))
        middle_x, middle_y = SENSOR_WIDTH / 2, SENSOR_HEIGHT / 2
        return (
            (x - middle_x) * zoom + (middle_x + MARGIN[1] + turn),
            (y - middle_y) * zoom + (middle_y + MARGIN[0] + nod),
        )

    def _inside(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        height, width = self._scene[1].shape
        return np.clip(x, 0, width - 1.001), np.clip(y, 0, height - 1.001)


def simulate_events(view: MovingView, duration_us: int, seed: int, threshold: float = THRESHOLD) -> Iterator[Batch]:
    """Yield the events of the view from time 0 to `duration_us`, in batches of `STEP_US`."""
    rng = np.random.default_rng(seed)
    thresholds = (threshold * rng.normal(1, 0.1, PIXELS).clip(0.5)).astype(np.float32)
    before = np.log(view.sensor_brightness(0) + np.float32(DARK))
    # Every pixel is somewhere on its way to the next event.
    reference = before + rng.uniform(-0.5, 0.5, PIXELS).astype(np.float32) * thresholds
    for begin in range(0, duration_us, STEP_US):
        length = min(STEP_US, duration_us - begin)
        after = np.log(view.sensor_brightness((begin + length) / 1e6) + np.float32(DARK))
        crossings = ((after - reference) / thresholds).astype(np.int32)
        fired = np.flatnonzero(crossings)
        number = np.abs(crossings[fired])
        pixel = np.repeat(fired, number)
        nth = np.arange(len(pixel)) - np.repeat(np.cumsum(number) - number, number) + 1
        level = reference[pixel] + np.sign(crossings[pixel]) * nth * thresholds[pixel]
        share = (level - before[pixel]) / np.where(after == before, 1, after - before)[pixel]
        noise = rng.poisson(NOISE_RATE * PIXELS * length / 1e6)
        share = np.concatenate([share.clip(0, 1), rng.random(noise)])
        pixel = np.concatenate([pixel, rng.integers(PIXELS, size=noise)])
        on = np.concatenate([crossings[pixel[: len(nth)]] > 0, rng.random(noise) < 0.5])
        t = (begin + share * (length - 1)).astype(np.uint32)
        order = np.argsort(t, kind="stable")
        y, x = np.divmod(pixel[order], SENSOR_WIDTH)
        yield t[order], x.astype(np.uint16), y.astype(np.uint16), on[order].astype(np.uint8)
        reference += crossings * thresholds
        before = after


def write_recording(folder: Path, batches: Iterable[Batch], t_offset: int, rectify_map: np.ndarray | None) -> int:
    """Write `events.h5` and, unless it is `None`, `rectify_map.h5` as DSEC ships them (Blosc-zstd, chunks of 65536).

    `batches` follow each other in time and are written one by one. Returns the number of events.
    """
    import h5py
    import hdf5plugin

    folder.mkdir(parents=True, exist_ok=True)
    blosc = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)
    types = {"t": np.uint32, "x": np.uint16, "y": np.uint16, "p": np.uint8}
    total, index = 0, [np.zeros(0, np.uint64)]
    with h5py.File(folder / "events.h5", "w") as file:
        datasets = [
            file.create_dataset(
                f"events/{name}", (0,), dtype, maxshape=(None,), chunks=(EVENTS_PER_CHUNK,), compression=blosc
            )
            for name, dtype in types.items()
        ]
        known_ms = 0
        for batch in batches:
            for dataset, values in zip(datasets, batch, strict=True):
                dataset.resize(total + len(values), axis=0)
                dataset[total:] = values
            if len(batch[0]):
                # The first event at or after each new millisecond lies in this batch.
                new_ms = np.arange(known_ms, int(batch[0][-1]) // 1000 + 1)
                index.append(total + np.searchsorted(batch[0], new_ms * 1000).astype(np.uint64))
                known_ms += len(new_ms)
            total += len(batch[0])
        file.create_dataset("ms_to_idx", data=np.concatenate(index), compression=blosc)
        file["t_offset"] = np.int64(t_offset)
    if rectify_map is not None:
        with h5py.File(folder / "rectify_map.h5", "w") as file:
            file.create_dataset("rectify_map", data=rectify_map.astype(np.float32), compression=blosc)
    return total


def write_long_recording(folder: Path, num_events: int, seed: int = 0) -> int:
    """Write a recording of at least `num_events` events, for measuring; returns its length in microseconds.

    Two seconds are simulated with half the usual threshold (10 million events per second, about the mean of DSEC) and
    repeated.
    """
    period = 2_000_000
    batches = list(simulate_events(MovingView(scene_seed(seed, "train", "event", 0)), period, seed, THRESHOLD / 2))
    in_period = sum(len(batch[0]) for batch in batches)
    rounds = -(-num_events // in_period)
    repeated = ((t + np.uint32(turn * period), *rest) for turn in range(rounds) for t, *rest in batches if len(t))
    write_recording(folder, repeated, FIRST_TIMESTAMP_US, lens_map())
    return rounds * period


def write_dsec_tree(
    root: Path,
    train: Sequence[str] = ("zurich_city_00_a",),
    test: Sequence[str] = ("zurich_city_13_a",),
    num_frames: int = 5,
    seed: int = 0,
) -> None:
    """Write DSEC-Semantic with raw events below `root` (the folder `DSEC`), as its archives unpack.

        {train,test}/<sequence>/events/left/{events.h5,rectify_map.h5}
        {train,test}/<sequence>/<sequence>_semantic_timestamps.txt
        {train,test}/<sequence>/{11classes,19classes}/data/000000.png

    Frames 0 to `num_frames - 1` of each sequence are labelled. No event precedes frame 0, as in the original.
    """
    for split, sequences in (("train", train), ("test", test)):
        for number, sequence in enumerate(sequences):
            view = MovingView(scene_seed(seed, split, "event", number))
            folder = root / split / sequence
            duration = (num_frames - 1) * FRAME_US + 1000
            write_recording(
                folder / "events/left", simulate_events(view, duration, view.seed), FIRST_TIMESTAMP_US, lens_map()
            )
            _write_timestamps(folder / f"{sequence}_semantic_timestamps.txt", FIRST_TIMESTAMP_US, num_frames)
            for frame in range(num_frames):
                label = view.label(frame * FRAME_US / 1e6)[:LABEL_ROWS]
                _save(label, folder / f"11classes/data/{frame:06d}.png")
                _save(_train_ids(label), folder / f"19classes/data/{frame:06d}.png")


def write_dsec_night_tree(
    root: Path, sequences: Sequence[str] = ("a", "b"), num_frames: int = 3, num_labels: int = 2, seed: int = 0
) -> None:
    """Write CMDA's night sequences below `root` (the folder `DSEC_Night`).

        zurich_city_09_<x>/events/left/{events.h5,rectify_map.h5}
        zurich_city_09_<x>/images/timestamps.txt, images/left/exposure_timestamps_left.txt
        zurich_city_09_<x>/warp_images/000798.png
        zurich_city_09_<x>/labels/zurich_city_09_<x>_000797_grey_gtFine_labelTrainIds.png

    Of each sequence the `num_frames` last frames before the training frames begin are written, of which the last
    `num_labels` have labels, and the `num_frames` first training frames. The recording covers these; one more warped
    image precedes it and one follows it, which must be left out.
    """
    for number, letter in enumerate(sequences):
        sequence = f"zurich_city_09_{letter}"
        folder, view = root / sequence, MovingView(scene_seed(seed, "val", "event", number), brightness=0.3)
        last_test = NIGHT_LAST_TEST_FRAMES[sequence]
        first, stop = last_test - min(num_frames, last_test - FIRST_NIGHT_FRAME) + 1, last_test + num_frames + 1
        # Seconds of the view begin with the recording, in the middle between two frames.
        start_us = FIRST_TIMESTAMP_US + first * FRAME_US - FRAME_US * 3 // 2
        events = simulate_events(view, (stop - first + 1) * FRAME_US, view.seed)
        write_recording(folder / "events/left", events, start_us, lens_map())
        _write_timestamps(folder / "images/timestamps.txt", FIRST_TIMESTAMP_US, stop + 1)
        exposures = folder / "images/left/exposure_timestamps_left.txt"
        exposures.parent.mkdir(parents=True)
        exposures.write_text("# start, end\n")
        for frame in (first - 2, *range(first, stop + 1)):
            time = max(FIRST_TIMESTAMP_US + frame * FRAME_US - start_us, 0) / 1e6
            _save(view.picture(time), folder / f"warp_images/{frame:06d}.png")
            if last_test - num_labels < frame <= last_test:
                name = f"{sequence}_{frame:06d}_grey_gtFine_labelTrainIds.png"
                _save(_train_ids(view.label(time)), folder / "labels" / name)


def _train_ids(label: np.ndarray) -> np.ndarray:
    """Ids of `STREET_CLASSES` -> Cityscapes trainIds."""
    return np.array([CITYSCAPES_CLASSES.index(name) for name in STREET_CLASSES], np.uint8)[label]


def _write_timestamps(path: Path, first_us: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{first_us + i * FRAME_US}\n" for i in range(number)), encoding="utf-8")


def _save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)
