"""Captioned, unlabelled pictures for `pretrain_small_diffusion.py`: what a small Stable Diffusion learns from.

As broad as procedural scenes allow: photographs by day, at night, in rain and fog; depth, infrared and event pictures;
edges, pencil sketches, and flat drawings in random colours. No label map is among them, and no scene of the synthetic
datasets with their default seed: their seeds (`madm_utils.scenes.scene_seed`) all lie below `FIRST_SEED`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from madm_utils.scene_canvas import REFERENCE_HEIGHT, SKY_DEPTH, Camera, Canvas, smooth_noise
from madm_utils.scene_objects import Barrier, Car, Person, Sign, Tree
from madm_utils.scene_sensors import (
    LUMINANCE,
    box_blur,
    depth_image,
    event_image,
    infrared_image,
    rgb_image,
)
from madm_utils.scenes import Scene, to_rgb8

FIRST_SEED = 2**60
"""Seeds of the synthetic datasets end below this one. (NumPy cuts seeds into words, so the very first scene is also a
validation scene of those who prepare the synthetic data with `--seed 1`; the benchmark has seed 0.)"""
HELD_OUT_SEED = 2**61
"""Scenes from here on are for measuring, never for training."""
NIGHT_SKY = np.array([0.03, 0.04, 0.09], np.float32)


@dataclass(frozen=True)
class Picture:
    """One training example: `image` (H, W, 3) uint8, its kind (a key of `KINDS`), and its caption."""

    image: np.ndarray
    kind: str
    caption: str


@dataclass(frozen=True)
class _View:
    """A painted scene, and a generator for the noise of whoever looks at it."""

    scene: Scene
    canvas: Canvas
    rng: np.random.Generator

    def blurred(self, image: np.ndarray, pixels: float) -> np.ndarray:
        """`image` (H, W) or (H, W, C) under a square mean filter whose radius is given for 128-pixel pictures."""
        radius = round(pixels * self.canvas.height / REFERENCE_HEIGHT)
        if image.ndim == 2:
            return box_blur(image, radius)
        return np.stack([box_blur(image[..., c], radius) for c in range(image.shape[2])], axis=2)


# --- how a street looks to ... ---------------------------------------------------------------------------------------


def _day(view: _View) -> np.ndarray:
    return rgb_image(view.canvas, view.scene.weather, view.rng)


def _fog(view: _View) -> np.ndarray:
    grey = np.full(3, view.rng.uniform(0.65, 0.8))
    weather = replace(view.scene.weather, haze_distance=view.rng.uniform(12, 30), horizon=grey, brightness=0.95)
    # Fog hides the sky as well, which the haze of the camera leaves alone.
    sky = (view.canvas.depth >= SKY_DEPTH)[..., None]
    return np.where(sky, grey * weather.brightness, rgb_image(view.canvas, weather, view.rng))


def _rain(view: _View) -> np.ndarray:
    rng, canvas = view.rng, view.canvas
    weather = replace(view.scene.weather, haze_distance=rng.uniform(40, 90), horizon=np.full(3, 0.55), brightness=0.7)
    image = rgb_image(canvas, weather, rng)
    horizon = round(canvas.camera.horizon_y)
    wet, mirrored = image[horizon:], image[max(0, 2 * horizon - canvas.height) : horizon][::-1]
    rows = min(len(wet), len(mirrored))
    wet[:rows] = 0.72 * wet[:rows] + 0.28 * view.blurred(np.ascontiguousarray(mirrored[:rows]), 1.5)
    streaks = Image.new("L", (canvas.width, canvas.height))
    draw, scale = ImageDraw.Draw(streaks), canvas.height / REFERENCE_HEIGHT
    for x, y, length in rng.uniform([-10, -10, 5], [128, 128, 12], (90, 3)) * scale:
        draw.line([(x, y), (x + 0.25 * length, y + length)], fill=70, width=max(1, round(scale)))
    return image + np.asarray(streaks, np.float32)[..., None] / 255


def _night(view: _View) -> np.ndarray:
    rng, canvas = view.rng, view.canvas
    sky = canvas.depth >= SKY_DEPTH
    ambient = canvas.color * np.float32([0.16, 0.17, 0.24])
    headlights = np.exp(-canvas.depth / rng.uniform(9, 16))[..., None] * canvas.color * 0.75
    # Lamps and lit windows are the only surfaces whose red is nearly full.
    lamps = np.where(((canvas.color[..., 0] > 0.97) & ~sky)[..., None], canvas.color, 0)
    glow = 1.5 * view.blurred(view.blurred(lamps, 2), 3) + lamps
    image = np.where(sky[..., None], NIGHT_SKY * rng.uniform(0.6, 1.6), ambient + headlights) + glow
    return image + 0.02 * rng.standard_normal(image.shape, dtype=np.float32)


def _depth(view: _View) -> np.ndarray:
    far_bright = depth_image(view.canvas, view.scene.weather, view.rng)
    return far_bright if view.rng.random() < 0.7 else np.where(far_bright > 0, 1 - far_bright, 0)


def _infrared(view: _View) -> np.ndarray:
    white_hot = infrared_image(view.canvas, view.scene.weather, view.rng)
    return white_hot if view.rng.random() < 0.7 else 1 - np.clip(white_hot, 0, 1)


def _event(view: _View) -> np.ndarray:
    return event_image(view.canvas, view.scene.weather, view.rng)


def _outline(view: _View) -> np.ndarray:
    """Strength of edges in brightness and distance, (H, W)."""
    light = view.blurred(np.maximum(view.canvas.color @ LUMINANCE, 0), 1.0)
    depth = np.log(view.canvas.depth)
    steps = [np.hypot(*np.gradient(plane)) for plane in (light, 0.3 * depth)]
    return np.maximum(*steps) * view.canvas.height / REFERENCE_HEIGHT


def _edges(view: _View) -> np.ndarray:
    return (_outline(view) > view.rng.uniform(0.05, 0.08)).astype(np.float32)


def _sketch(view: _View) -> np.ndarray:
    paper = 0.95 + 0.02 * smooth_noise(view.rng, view.canvas.height, view.canvas.width, 32)
    shade = 0.12 * (1 - np.clip(view.canvas.color @ LUMINANCE, 0, 1))
    pencil = np.clip(_outline(view) * view.rng.uniform(4, 7), 0, 0.85)
    return paper - shade - pencil * (1 + 0.15 * view.rng.standard_normal(pencil.shape, dtype=np.float32))


_PHOTOGRAPHS: dict[str, tuple[str, Callable[[_View], np.ndarray]]] = {
    "day": ("a photograph of {} by day", _day),
    "night": ("a photograph of {} at night", _night),
    "rain": ("a photograph of {} in the rain", _rain),
    "fog": ("a photograph of {} in fog", _fog),
}
_SENSORS: dict[str, tuple[str, Callable[[_View], np.ndarray]]] = {
    "depth": ("a depth map of {}", _depth),
    "infrared": ("an infrared picture of {}", _infrared),
    "event": ("an event camera picture of {}", _event),
}
_OUTLINES: dict[str, tuple[str, Callable[[_View], np.ndarray]]] = {
    "edges": ("an edge drawing of {}", _edges),
    "sketch": ("a pencil sketch of {}", _sketch),
}
FLAT_STREET = ("flat street", "a flat drawing of {}")
FLAT_SHAPES = ("flat shapes", "a flat drawing of coloured shapes")
CAPTIONS = {kind: caption for kind, (caption, _) in (_PHOTOGRAPHS | _SENSORS | _OUTLINES).items()} | dict(
    (FLAT_STREET, FLAT_SHAPES)
)
"""Kind of picture -> its caption, with a place for what is in the street."""
KINDS = tuple(CAPTIONS)
PICTURES_PER_SCENE = 2 + len(_SENSORS) + 1 + 2
"""Two of the photographs, all sensors, one of the outlines, two flat drawings."""


# --- flat drawings ---------------------------------------------------------------------------------------------------


class _FlatCanvas(Canvas):
    """Paints every single surface in a random colour of its own, without texture and details."""

    def __init__(self, camera: Camera, side: int, rng: np.random.Generator) -> None:
        super().__init__(camera, side, side, rng)
        self._rng = rng
        self.is_sky = np.ones((side, side), bool)

    def paint(self, surface, name, color, temperature, shape=True, texture=0.0) -> None:
        mask = surface.inside & shape
        np.copyto(self.color[surface.box], self._rng.random(3, np.float32), where=mask[..., None])
        self.is_sky[surface.box] &= ~mask

    def tint(self, surface, color, temperature=None, shape=True, texture=0.0) -> None:
        """Details are left out."""


def _flat_street(rng: np.random.Generator, side: int) -> tuple[Scene, np.ndarray]:
    scene = Scene.sample(rng, side, side)
    canvas = _FlatCanvas(scene.camera, side, rng)
    scene.paint(canvas, rng)
    canvas.color[canvas.is_sky] = rng.random(3)
    return scene, canvas.color


def _flat_shapes(rng: np.random.Generator, side: int) -> np.ndarray:
    """Discs, boxes, triangles and bars, from wide to thin, over each other."""
    picture = Image.new("RGB", (side, side), _any_color(rng))
    draw = ImageDraw.Draw(picture)
    for size in np.sort(rng.uniform(0.02, 0.6, rng.integers(8, 40)))[::-1] * side:
        x, y = rng.uniform(-0.1, 1.1, 2) * side
        slim = size * rng.uniform(0.05, 1)
        box = [x - size / 2, y - slim / 2, x + size / 2, y + slim / 2]
        if rng.random() < 0.5:
            box = [x - slim / 2, y - size / 2, x + slim / 2, y + size / 2]
        kind = rng.integers(4)
        if kind == 0:
            draw.ellipse(box, fill=_any_color(rng))
        elif kind == 1:
            corners = rng.uniform(-size / 2, size / 2, (3, 2)) + [x, y]
            draw.polygon([tuple(corner) for corner in corners], fill=_any_color(rng))
        else:
            draw.rectangle(box, fill=_any_color(rng))
    return np.asarray(picture, np.float32) / 255


def _any_color(rng: np.random.Generator) -> tuple[int, int, int]:
    return tuple(int(value) for value in rng.integers(0, 256, 3))


# --- all of them -----------------------------------------------------------------------------------------------------


def _subject(scene: Scene) -> str:
    """What a caption says is in the picture: 'a street with cars, people and trees'."""
    items = scene.actors + scene.background
    found = [name for name, kind, least in _THINGS if sum(isinstance(item, kind) for item in items) >= least]
    if not found:
        return "a street"
    return "a street with " + (found[0] if len(found) == 1 else ", ".join(found[:-1]) + " and " + found[-1])


_THINGS = (("cars", Car, 3), ("people", Person, 4), ("trees", Tree, 14), ("fences", Barrier, 4), ("signs", Sign, 3))
"""Word, class of the object, how many of them make it worth a word."""


def scene_pictures(seed: int, side: int = REFERENCE_HEIGHT) -> list[Picture]:
    """Draw `PICTURES_PER_SCENE` pictures: one street as several cameras see it, and two flat drawings.

    Args:
        seed: `FIRST_SEED` or above.
        side: height and width in pixels.
    """
    if seed < FIRST_SEED:
        raise ValueError(f"scenes below {FIRST_SEED} may be those of the synthetic datasets, got {seed}")
    rng = np.random.default_rng(seed)
    scene = Scene.sample(rng, side, side)
    canvas = Canvas(scene.camera, side, side, rng)
    scene.paint(canvas, rng)
    view = _View(scene, canvas, rng)
    photographs = rng.choice(list(_PHOTOGRAPHS), 2, replace=False, p=[0.4, 0.2, 0.2, 0.2])
    outline = str(rng.choice(list(_OUTLINES)))
    chosen = {str(kind): _PHOTOGRAPHS[kind] for kind in photographs} | _SENSORS | {outline: _OUTLINES[outline]}
    subject = _subject(scene)
    pictures = [
        Picture(to_rgb8(render(view)), kind, caption.format(subject)) for kind, (caption, render) in chosen.items()
    ]
    flat_scene, flat_street = _flat_street(rng, side)
    pictures.append(Picture(to_rgb8(flat_street), FLAT_STREET[0], FLAT_STREET[1].format(_subject(flat_scene))))
    pictures.append(Picture(to_rgb8(_flat_shapes(rng, side)), *FLAT_SHAPES))
    return pictures
