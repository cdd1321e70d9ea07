"""Windows of raw events and their pictures, against tiny recordings by hand and a slow loop over single events."""

import json
import math
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import h5py
import numpy as np
import pytest

from madm_utils import event_recording, event_simulation
from madm_utils.cli import UserError
from madm_utils.event_recording import close_recording, open_recording
from madm_utils.events import EventSettings, EventWindow, normalize_voxel
from madm_utils.raw_files import RawPath, RawTree

OFFSET = 5_000_000_123
HEIGHT, WIDTH = 480, 640
IDENTITY = np.stack(np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT)), axis=2).astype(np.float32)


@pytest.fixture(autouse=True)
def _close():
    yield
    close_recording()


def write(folder: Path, events: list[tuple[int, int, int, int]], rectify_map: np.ndarray = IDENTITY) -> EventWindow:
    """Write (t, x, y, p) events; return a window over all of them."""
    columns = np.array(events, np.int64).reshape(-1, 4).T
    batch = tuple(column.astype(kind) for column, kind in zip(columns, ("u4", "u2", "u2", "u1"), strict=True))
    event_simulation.write_recording(folder, [batch], OFFSET, rectify_map)
    paths = [RawPath.on_disk(folder / name) for name in ("events.h5", "rectify_map.h5")]
    return EventWindow(*paths, OFFSET, OFFSET + 10**9)


def change(window: EventWindow, name: str, values, file: str = "events") -> EventWindow:
    """Replace a dataset of the recording by `values`, or remove it for `None`."""
    path = getattr(window, file).container
    with h5py.File(path, "r+") as h5:
        del h5[name]
        if values is not None:
            h5[name] = values
    return replace(window, **{file: RawPath.on_disk(path)})


def random_events(seed: int, number: int) -> list[tuple[int, int, int, int]]:
    """Events in a few pixels, some at the borders, with gaps of several milliseconds and equal times."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.choice([3_000, 9_000, 9_500, 20_000], number) + rng.integers(0, 900, number))
    x = rng.choice([0, 1, 2, 300, 301, 638, 639], number)
    y = rng.choice([0, 1, 200, 201, 478, 479], number)
    return list(zip(t.tolist(), x.tolist(), y.tolist(), rng.integers(0, 2, number).tolist(), strict=True))


def random_map(seed: int) -> np.ndarray:
    """Places that shrink, stretch and leave the picture."""
    return IDENTITY + np.random.default_rng(seed).normal(0, 2, IDENTITY.shape).astype(np.float32)


def slow_tensor(events, rectify_map, settings: EventSettings) -> np.ndarray:
    """Each event by itself, in plain Python."""
    planes = {"polarity": 2, "voxel": settings.bins}.get(settings.representation, 1)
    cells = np.zeros((planes, HEIGHT, WIDTH))
    for t, x, y, p in events:
        place_x, place_y = (float(v) for v in rectify_map[y, x]) if settings.rectify else (x, y)
        if settings.representation != "voxel":
            column, row = math.floor(place_x + 0.5), math.floor(place_y + 0.5)
            if 0 <= column < WIDTH and 0 <= row < HEIGHT:
                cells[0 if planes == 1 or p else 1, row, column] += 1
            continue
        duration = events[-1][0] - events[0][0]
        moment = (settings.bins - 1) * (t - events[0][0]) / duration if duration else 0
        for b in range(settings.bins):
            for column in (math.floor(place_x), math.floor(place_x) + 1):
                for row in (math.floor(place_y), math.floor(place_y) + 1):
                    weight = (1 - abs(column - place_x)) * (1 - abs(row - place_y)) * max(0, 1 - abs(b - moment))
                    if 0 <= column < WIDTH and 0 <= row < HEIGHT:
                        cells[b, row, column] += (2 * p - 1) * weight
    if settings.representation == "edge":
        return (cells >= settings.limit).astype(float)
    if settings.representation != "voxel":
        return np.minimum(cells / settings.limit, 1)
    filled = [v for v in cells.ravel() if abs(v) > 1e-9]
    mean = sum(filled) / len(filled)
    deviation = math.sqrt(sum(v * v for v in filled) / len(filled) - mean**2)
    bound = settings.limit * (len(events) - 1) / 500_000
    cut = np.zeros_like(cells)
    for place in zip(*np.nonzero(np.abs(cells) > 1e-9), strict=True):
        cut[place] = min(max((cells[place] - mean) / deviation, -bound), bound)
    return np.where(cut > 0, cut / cut.max(), cut / -cut.min())


SETTINGS = [
    EventSettings("edge"),
    EventSettings("edge", clip=1, rectify=False),
    EventSettings("count", clip=4),
    EventSettings("polarity", clip=2),
    EventSettings("voxel"),
    EventSettings("voxel", clip=1e4, bins=3),
    EventSettings("voxel", clip=400, bins=2, rectify=False),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.representation}-{s.bins}-{s.rectify}")
def test_equals_the_slow_loop_in_blocks_of_any_size(tmp_path, monkeypatch, settings):
    events, rectify_map = random_events(0, 400), random_map(1)
    window = replace(write(tmp_path, events, rectify_map), settings=settings)
    tensor = np.asarray(window.load_tensor(tmp_path))
    expected = slow_tensor(events, rectify_map, settings)
    assert tensor.dtype == np.float32 and tensor.shape == (expected.shape[0] * HEIGHT, WIDTH)
    np.testing.assert_allclose(tensor.reshape(expected.shape), expected, atol=2e-6)
    assert 0 < np.abs(tensor).max() <= 1
    monkeypatch.setattr(event_recording, "EVENTS_PER_BLOCK", 7)
    np.testing.assert_allclose(np.asarray(window.load_tensor(tmp_path)), tensor, atol=1e-6)


def test_pictures_by_hand(tmp_path):
    """Pixel (2, 1) goes to (4, 3) and pixel (9, 9) out of the picture."""
    rectify_map = IDENTITY.copy()
    rectify_map[1, 2], rectify_map[9, 9] = (4.4, 2.5), (-0.6, 9)
    events = [(10, 2, 1, 1), (20, 2, 1, 0), (30, 2, 1, 1), (40, 639, 479, 0), (50, 9, 9, 1)]
    window = write(tmp_path, events, rectify_map)

    def picture(**settings) -> np.ndarray:
        image = replace(window, settings=EventSettings(**settings)).load(tmp_path)
        assert image.info["num_events"] == 5
        return np.asarray(image)

    edge, count = picture(), picture(representation="count", clip=4)
    polarity = picture(representation="polarity", clip=2)
    assert edge.shape == (HEIGHT, WIDTH) and edge[3, 4] == 255 and edge.sum() == 255
    assert (count[3, 4], count[479, 639]) == (191, 64) and count.astype(int).sum() == 255  # 3/4 and 1/4 of 255
    assert polarity[3, 4].tolist() == [255, 0, 128] and polarity[479, 639].tolist() == [0, 0, 128]
    assert picture(rectify=False)[1, 2] == 255
    # Voxel: +1 at (4.4, 2.5) is shared as .3 .3 .2 .2; -1 stays at the corner; (9, 9) leaves .4 in column 0.
    values = np.array([0.3, 0.3, 0.2, 0.2, -1, 0.4])
    standard = (values - values.mean()) / values.std()
    bound = 1.5 * 4 / 500_000
    assert (np.abs(standard) > bound).all()
    voxel = picture(representation="voxel")
    assert [voxel[2, 4], voxel[3, 5], voxel[9, 0], voxel[479, 639], voxel[0, 0]] == [255, 255, 255, 0, 128]
    wide = np.asarray(replace(window, settings=EventSettings("voxel", clip=1e6)).load_tensor(tmp_path))
    np.testing.assert_allclose(wide[2, 4], standard[0] / standard.max(), atol=1e-6)
    np.testing.assert_allclose([wide[9, 0], wide[479, 639]], [1, -1], atol=1e-6)


def test_time_bins_by_hand(tmp_path):
    """Five events from 0 to 100 us in 3 bins, on pixels of their own: 25 us is half in the first two bins."""
    window = write(tmp_path, [(t, i, 0, 1) for i, t in enumerate((0, 25, 50, 90, 100))])
    recording = open_recording(window.events, window.rectify_map, tmp_path)
    expected = [[1, 0.5, 0, 0, 0], [0, 0.5, 1, 0.2, 0], [0, 0, 0, 0.8, 1]]
    np.testing.assert_allclose(recording.voxel(0, 5, 3)[:, :5], expected, atol=1e-12)


def test_normalisation_by_hand():
    """Mean 0, deviation sqrt(12.5); cut at 1000 * 250 / 500000 = 0.5 deviations."""
    voxel = normalize_voxel(np.array([[1.0, 2, 0], [0, 3, -6]]), 251, 1000)
    first = 1 / math.sqrt(12.5) / 0.5
    np.testing.assert_allclose(voxel, [[first, 1, 0], [0, 1, -1]], atol=1e-12)


def test_normalisation_without_a_sign():
    """Where no value of a sign is left, that sign is 0: equal cells, and no cells."""
    assert np.array_equal(normalize_voxel(np.array([[2.0, 2.0, 0.0]]), 9, 1.5), np.zeros((1, 3)))
    assert np.array_equal(normalize_voxel(np.zeros((1, 3)), 0, 1.5), np.zeros((1, 3)))


def test_window_borders(tmp_path):
    """start <= time < end, on microseconds, also where milliseconds are empty and outside the recording."""
    events = random_events(3, 60)
    window = write(tmp_path, events)
    recording = open_recording(window.events, window.rectify_map, tmp_path)
    times = [t for t, *_ in events]
    ends = sorted(
        {*times, *(t + 1 for t in times), 0, 2_999, 4_000, 8_000, 9_000, 20_900, 21_000, 99_000, -500, -5_000}
    )
    for start in ends:
        for end in ends[ends.index(start) :: 3]:
            first, stop = recording.index_range(OFFSET + start, OFFSET + end)
            inside = [i for i, t in enumerate(times) if start <= t < end]
            assert list(range(first, stop)) == inside, (start, end)
    for time in ends:
        before = [i for i, t in enumerate(times) if t <= time]
        outside = time < 0 or time // 1000 > times[-1] // 1000
        assert recording.last_index(OFFSET + time) == (-1 if outside or not before else before[-1]), time


def test_events_from_index_to_index_both_belong(tmp_path):
    window = write(tmp_path, [(1_000 * i, i, 0, 1) for i in range(10)])
    window = replace(window, start_us=OFFSET + 3_400, end_us=OFFSET + 6_000, event_range=(3, 6))
    window = replace(window, settings=EventSettings("count", clip=1))
    assert np.flatnonzero(np.asarray(window.load(tmp_path))[0]).tolist() == [3, 4, 5, 6]
    with pytest.raises(UserError, match=r"events 3 to 7 are given .* has 3 to 6 there; the index file belongs to"):
        replace(window, event_range=(3, 7)).load(tmp_path)


@pytest.mark.parametrize("events", [[], [(7_000, 1, 1, 1)]], ids=["recording", "window"])
def test_empty_is_black_and_can_be_counted(tmp_path, events):
    window = replace(write(tmp_path, events), end_us=OFFSET + 5_000, height=440)
    for representation, shade in (("edge", 0), ("count", 0), ("polarity", 0), ("voxel", 128)):
        image = replace(window, settings=EventSettings(representation)).load(tmp_path)
        assert image.size == (640, 440) and image.info["num_events"] == 0
        assert np.unique(np.asarray(image)).tolist() == [shade]


def test_height_keeps_the_upper_rows_of_every_bin(tmp_path):
    events = random_events(4, 50)
    window = replace(write(tmp_path, events), settings=EventSettings("voxel", bins=2))
    whole = np.asarray(window.load_tensor(tmp_path)).reshape(2, HEIGHT, WIDTH)
    rows = np.asarray(replace(window, height=440).load_tensor(tmp_path)).reshape(2, 440, WIDTH)
    assert np.array_equal(rows, whole[:, :440])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"representation": "edges"}, "unknown event representation 'edges'; give edge, count, polarity, voxel"),
        ({"window_ms": 0}, "event window must be positive, got 0"),
        ({"clip": float("nan")}, "event clip must be positive, got nan"),
        ({"representation": "voxel", "bins": 0}, "0 event bins for 'voxel'"),
        ({"bins": 5}, "5 event bins for 'edge'.*only for 'voxel'"),
    ],
)
def test_settings_that_make_no_sense(values, message):
    with pytest.raises(UserError, match=message):
        EventSettings(**values)


def test_identity_and_name(tmp_path):
    window = write(tmp_path, random_events(0, 20))
    identity = json.loads(json.dumps(window.identity()))
    assert pickle.loads(pickle.dumps(window)).identity() == identity
    assert replace(window, settings=EventSettings(clip=3.0)).identity() == identity  # the default, given
    others = [
        replace(window, end_us=window.end_us + 1),
        replace(window, settings=EventSettings(clip=2)),
        replace(window, settings=EventSettings(rectify=False)),
        replace(window, event_range=(0, 1)),
        replace(window, height=440),
        replace(window, events=replace(window.events, size=1)),
    ]
    assert all(other.identity() != identity for other in others)
    assert str(replace(window, event_range=(0, 1))).endswith(
        f"events.h5 ({OFFSET} to {OFFSET + 10**9} us, events 0 to 1)"
    )


def test_memory_does_not_grow_with_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(event_recording, "EVENTS_PER_BLOCK", 2**13)
    number = 2**19
    batch = (
        np.arange(number, dtype=np.uint32),
        *(np.zeros(number, kind) for kind in (np.uint16, np.uint16, np.uint8)),
    )
    event_simulation.write_recording(tmp_path, [batch], OFFSET, IDENTITY)
    paths = [RawPath.on_disk(tmp_path / name) for name in ("events.h5", "rectify_map.h5")]
    peaks = {}
    for representation in ("edge", "voxel"):
        for length in (2**14, 2**19):
            window = EventWindow(*paths, OFFSET, OFFSET + length, EventSettings(representation))
            replace(window, end_us=OFFSET).load(tmp_path)  # tables of the rectification
            tracemalloc.start()
            assert window.load(tmp_path).info["num_events"] == length
            peaks[representation, length] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peaks[representation, 2**19] < 1.02 * peaks[representation, 2**14]


def not_h5(window):
    window.events.container.write_bytes(b"no events here" * 100)
    return window


def truncated(window):
    path = window.events.container
    path.write_bytes(path.read_bytes()[:-1000])
    return window


def damaged(window):
    path = window.events.container
    with h5py.File(path) as file:
        chunk = file["events/x"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(content)
    return window


def events_with(name, change_values):
    def damage(window):
        with h5py.File(window.events.container) as file:
            values = file[name][...]
        return change(window, name, change_values(values))

    return damage


def swapped(t):
    t[10], t[200] = t[200], t[10]
    return t


def later_start(index):
    index[9:] += 1
    return index


DAMAGES = {
    "not h5": (not_h5, "events.h5 cannot be opened as an HDF5 file .*copy or download it again"),
    "truncated": (truncated, "events.h5 is truncated .*copy or download it again"),
    "damaged": (damaged, "events.h5 is damaged .*copy or download it again"),
    "no dataset": (
        lambda window: change(window, "events/p", None),
        "events.h5 holds no dataset 'events/p'; found events, events/t, events/x, events/y, ms_to_idx, t_offset",
    ),
    "no map": (
        lambda window: change(window, "rectify_map", None, "rectify_map"),
        "rectify_map.h5 holds no dataset 'rectify_map'; found nothing",
    ),
    "length": (events_with("events/x", lambda x: x[:-1]), "event datasets differ in length .*'t': 300, 'x': 299"),
    "order": (events_with("events/t", swapped), "timestamps are out of order between events 0 and 300"),
    "index too late": (events_with("ms_to_idx", later_start), r"ms_to_idx\[9\] = \d+ is not the first event of mill"),
    "index too short": (events_with("ms_to_idx", lambda i: i[:10]), "ms_to_idx does not fit the 300 events"),
    "index falls": (events_with("ms_to_idx", lambda i: i[::-1]), "ms_to_idx does not fit the 300 events"),
    "x": (events_with("events/x", lambda x: x + 1), "event between 0 and 300 lies at x = 640 or y = 479, outside the"),
    "y": (events_with("events/y", lambda y: y + 1), "lies at x = 639 or y = 480, outside the sensor of 640x480"),
    "polarity": (events_with("events/p", lambda p: p + 1), "polarity 2 between events 0 and 300; expected 0 or 1"),
    "map shape": (
        lambda window: change(window, "rectify_map", IDENTITY[:440], "rectify_map"),
        r"rectify_map has shape \(440, 640, 2\), expected \(480, 640, 2\); take the file of the same sequence",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_have_one_message(tmp_path, damage):
    harm, message = DAMAGES[damage]
    window = harm(replace(write(tmp_path, random_events(5, 300)), settings=EventSettings("polarity")))
    start = 9_000 if damage == "index too late" else 0
    with pytest.raises(UserError, match=message):
        replace(window, start_us=OFFSET + start).load(tmp_path)


def test_order_is_checked_from_block_to_block(tmp_path, monkeypatch):
    monkeypatch.setattr(event_recording, "EVENTS_PER_BLOCK", 1)
    window = events_with("events/t", swapped)(write(tmp_path, random_events(5, 300)))
    with pytest.raises(UserError, match="timestamps are out of order between events 11 and 12"):
        window.load(tmp_path)


def test_window_that_ends_before_it_starts(tmp_path):
    with pytest.raises(UserError, match=r"the window from \d+ to \d+ us ends before it starts"):
        replace(write(tmp_path, []), end_us=OFFSET - 1).load(tmp_path)


def test_without_the_blosc_plugin(tmp_path):
    write(tmp_path, random_events(0, 20))
    code = (
        "import sys; sys.modules['hdf5plugin'] = None\n"
        "from pathlib import Path\n"
        "from madm_utils.events import EventWindow\n"
        "from madm_utils.raw_files import RawPath\n"
        "EventWindow(RawPath.on_disk(Path(sys.argv[1])), None, 0, 1).load(Path('.'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "events.h5")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert "UserError" in done.stderr and "'events/p' is compressed with blosc" in done.stderr
    assert "pip install hdf5plugin" in done.stderr


def test_without_h5py(tmp_path, monkeypatch):
    window = write(tmp_path, [])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="pip install h5py hdf5plugin"):
        window.load(tmp_path)


def test_recordings_in_an_archive_are_unpacked_one_at_a_time(tmp_path):
    events = {name: random_events(seed, 100) for seed, name in enumerate("ab")}
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for name in events:
            write(tmp_path / name, events[name], random_map(9))
            for file in ("events.h5", "rectify_map.h5"):
                archive.write(tmp_path / name / file, f"{name}/{file}")
    tree, scratch = RawTree.open(tmp_path / "raw.zip"), tmp_path / "scratch"
    for name in ("a", "a", "b", "a"):
        window = EventWindow(
            tree.files[f"{name}/events.h5"], tree.files[f"{name}/rectify_map.h5"], OFFSET, OFFSET + 10**6
        )
        on_disk = replace(window, events=RawPath.on_disk(tmp_path / name / "events.h5"))
        picture = window.load(scratch)
        assert len(list(scratch.iterdir())) == 1  # the map is read and deleted
        assert np.array_equal(np.asarray(picture), np.asarray(on_disk.load(scratch))) and np.asarray(picture).any()
    close_recording()
    assert not list(scratch.iterdir())


def test_a_recording_that_cannot_be_used_leaves_nothing(tmp_path):
    window = change(write(tmp_path / "a", []), "t_offset", None)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.write(window.events.container, "events.h5")
    packed = RawTree.open(tmp_path / "raw.zip").files["events.h5"]
    with pytest.raises(UserError, match="raw.zip!events.h5 holds no dataset 't_offset'"):
        replace(window, events=packed).load(tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def load_in_child(window: EventWindow, scratch: Path) -> tuple[bytes, int]:
    picture = window.load(scratch).tobytes()
    files = len(list(scratch.iterdir()))
    close_recording()
    return picture, files


def test_forked_processes_have_recordings_of_their_own(tmp_path):
    window = write(tmp_path / "a", random_events(0, 100))
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.write(window.events.container, "events.h5")
    window = replace(window, events=RawTree.open(tmp_path / "raw.zip").files["events.h5"])
    expected = window.load(tmp_path / "scratch").tobytes()
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        assert pool.submit(load_in_child, window, tmp_path / "scratch").result(60) == (expected, 2)
    assert window.load(tmp_path / "scratch").tobytes() == expected
    assert len(list((tmp_path / "scratch").iterdir())) == 1


def test_simulated_events_are_where_the_rectified_picture_changes(tmp_path):
    """Rectified, the edge picture lies on the contours of the view; unrectified less so. The seed decides all."""
    view = event_simulation.MovingView(7)
    batches = list(event_simulation.simulate_events(view, 30_000, seed=1))
    again = list(event_simulation.simulate_events(event_simulation.MovingView(7), 30_000, seed=1))
    for columns, others in zip(batches, again, strict=True):
        assert all(np.array_equal(column, other) for column, other in zip(columns, others, strict=True))
    number = event_simulation.write_recording(tmp_path, batches, OFFSET, event_simulation.lens_map())
    paths = [RawPath.on_disk(tmp_path / name) for name in ("events.h5", "rectify_map.h5")]
    window = EventWindow(*paths, OFFSET + 10_000, OFFSET + 30_000)
    assert 50_000 < number == replace(window, start_us=OFFSET).load(tmp_path).info["num_events"]
    grey = view.picture(0.02).mean(axis=2)
    contours = np.hypot(*np.gradient(grey))
    rectified, raw = (
        np.asarray(replace(window, settings=EventSettings(rectify=rectify)).load(tmp_path)) > 0
        for rectify in (True, False)
    )
    assert contours[rectified].mean() > 4 * contours.mean()
    assert contours[rectified].mean() > 1.3 * contours[raw].mean()
