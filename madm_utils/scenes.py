"""Procedural street scenes with exact labels, as RGB, depth, infrared and event-edge pictures.

A scene is a function of its seed: a street with two lanes, sidewalks, lots of buildings, walls, fences and trees, and
cars, people, lamps and signs, all sampled in metres (`scene_layout`) and then painted at the wanted size. The four
sensors (`scene_sensors`) look at the same painted scene, so they share the label; `scene_seed` keeps the seeds of
splits and modalities apart.
"""

from dataclasses import dataclass

import numpy as np

from madm_utils.cli import UserError
from madm_utils.scene_canvas import Camera, Canvas
from madm_utils.scene_layout import Street, paint_ground, paint_sky, sample_actors, sample_background
from madm_utils.scene_objects import SceneObject
from madm_utils.scene_sensors import SENSORS, Weather

MODALITIES = tuple(SENSORS)
SPLITS = ("train", "val", "test")
SEED_BITS, INDEX_BITS = 32, 24
"""Limits of `scene_seed`, whose results fit a signed 64-bit integer."""
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Scene:
    """A street and everything on it, in metres, and the camera that looks at it."""

    weather: Weather
    street: Street
    camera: Camera
    background: list[SceneObject]
    """In the order to paint them."""
    actors: list[SceneObject]
    """Far ones first."""

    @classmethod
    def sample(cls, rng: np.random.Generator, height: int, width: int) -> "Scene":
        """Draw a scene for pictures of `height` x `width` pixels; the size does not shift the draws."""
        weather, street = Weather.sample(rng), Street.sample(rng)
        camera = Camera(
            focal=height * rng.uniform(0.74, 0.88),
            center_x=width / 2 + height * rng.uniform(-0.1, 0.1),
            horizon_y=height * rng.uniform(0.44, 0.54),
            height_m=rng.uniform(1.4, 1.9),
        )
        background, actors = sample_background(rng, weather, street), sample_actors(rng, weather, street)
        return cls(weather, street, camera, background, sorted(actors, key=lambda actor: -actor.z))

    def paint(self, canvas: Canvas, rng: np.random.Generator) -> None:
        """Paint sky, ground and objects; `rng` makes the clouds."""
        paint_sky(canvas, self.weather, rng)
        paint_ground(canvas, self.weather, self.street)
        for item in self.background + self.actors:
            item.draw(canvas)


def scene_seed(seed: int, split: str, modality: str, index: int) -> int:
    """Seed of scene `index` of a split, never shared by two splits, two modalities or two user seeds."""
    if split not in SPLITS or modality not in MODALITIES:
        raise UserError(
            f"no scenes for split '{split}' and modality '{modality}'; "
            f"splits: {', '.join(SPLITS)}; modalities: {', '.join(MODALITIES)}"
        )
    for name, value, bits in (("seed", seed, SEED_BITS), ("scene index", index, INDEX_BITS)):
        if not 0 <= value < 2**bits:
            raise UserError(f"{name} {value} is out of range; expected 0 to {2**bits - 1}")
    group = SPLITS.index(split) * len(MODALITIES) + MODALITIES.index(modality)
    return ((seed * len(SPLITS) * len(MODALITIES) + group) << INDEX_BITS) | index


def render_scene(
    seed: int, modality: str, height: int = 128, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw scene `seed` as `modality` sees it.

    Args:
        seed: any non-negative integer, see `scene_seed`.
        modality: one of `MODALITIES`.
        height: of the picture in pixels; the vertical field of view is the same at any height.
        width: in pixels, `None` for a square; a wider picture sees more to the sides.

    Returns:
        image (H, W, 3) uint8, three equal channels unless RGB; label (H, W) uint8 ids of `STREET_CLASSES`, the same
        for every modality.
    """
    if modality not in SENSORS:
        raise UserError(f"unknown modality '{modality}'; modalities: {', '.join(MODALITIES)}")
    width = height if width is None else width
    if min(height, width) < SMALLEST_SIDE:
        raise UserError(f"a scene of {height}x{width} pixels is too small; both sides need at least {SMALLEST_SIDE}")
    # Separate streams: neither the size of the picture nor the sensor may shift the draws that make the scene.
    layout_rng, paint_rng = (np.random.default_rng([stream, seed]) for stream in (0, 1))
    noise_rng = np.random.default_rng([2 + MODALITIES.index(modality), seed])
    scene = Scene.sample(layout_rng, height, width)
    canvas = Canvas(scene.camera, height, width, paint_rng)
    scene.paint(canvas, paint_rng)
    return to_rgb8(SENSORS[modality](canvas, scene.weather, noise_rng)), canvas.label


def to_rgb8(picture: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) in [0, 1], clipped to it -> (H, W, 3) uint8."""
    if picture.ndim == 2:
        picture = np.repeat(picture[..., None], 3, axis=2)
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
