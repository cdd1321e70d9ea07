"""The picture under construction of a procedural street scene: camera, surfaces and pixel buffers.

World coordinates are metres: `x` to the right of the camera, `y` up from the road, `z` forward. Everything is drawn
in metres, so that a scene looks the same at any picture size; a wider picture simply sees more to the sides.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from madm_utils.label_spaces import STREET_CLASSES

CLASS_ID = {name: index for index, name in enumerate(STREET_CLASSES)}
SKY_DEPTH = 300.0
"""Metres; depth of pixels that show the sky."""
REFERENCE_HEIGHT = 128
"""Picture height at which thicknesses given in pixels are meant."""


@dataclass(frozen=True)
class Camera:
    """Pinhole camera looking along `z`; all but `height_m` in pixels of the picture."""

    focal: float
    center_x: float
    horizon_y: float
    height_m: float

    def column(self, x: float, z: float) -> float:
        return self.center_x + self.focal * x / z

    def row(self, y: float, z: float) -> float:
        return self.horizon_y + self.focal * (self.height_m - y) / z


@dataclass(frozen=True)
class Surface:
    """A visible rectangle of the world and the box of pixels around it.

    `u` (along) and `v` (up) are the metres of each pixel on the surface, `z` its distance, `inside` whether the pixel
    shows the surface; all broadcast to the box.
    """

    rows: slice
    cols: slice
    u: np.ndarray
    v: np.ndarray
    z: np.ndarray | float
    inside: np.ndarray

    @property
    def box(self) -> tuple[slice, slice]:
        return self.rows, self.cols


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Normal noise (height, width) float32, smooth over 1/`cells` of the height."""
    size = (cells, max(2, round(cells * width / height)))
    coarse = Image.fromarray(rng.standard_normal(size, dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def pixel_span(start: float, stop: float, limit: int) -> slice:
    """Pixels whose centres lie in [start, stop), cut to the picture."""
    first = min(max(math.ceil(start - 0.5), 0), limit)
    return slice(first, min(max(math.ceil(stop - 0.5), first), limit))


class Canvas:
    """Label, depth, temperature and colour of every pixel, painted from far to near.

    `label` uint8 ids of `STREET_CLASSES`; `depth` float32 metres; `temperature` float32, 0 (cold sky) to 1 (skin);
    `color` float32 RGB, 0 to 1 in daylight.
    """

    def __init__(self, camera: Camera, height: int, width: int, rng: np.random.Generator) -> None:
        self.camera, self.height, self.width = camera, height, width
        self.label = np.full((height, width), CLASS_ID["sky"], np.uint8)
        self.depth = np.full((height, width), SKY_DEPTH, np.float32)
        self.temperature = np.zeros((height, width), np.float32)
        self.color = np.zeros((height, width, 3), np.float32)
        self.grain = rng.standard_normal((height, width), dtype=np.float32) + smooth_noise(rng, height, width, 32)

    def min_thickness(self, z: float, pixels: float = 2.0) -> float:
        """Metres that `pixels` (of a 128-pixel picture) cover at distance `z`."""
        return pixels * self.height / REFERENCE_HEIGHT * z / self.camera.focal

    def front(self, left: float, right: float, low: float, high: float, z: float) -> Surface:
        """Rectangle across the view at distance `z`; `u` = x of the world, `v` = height above the road."""
        camera = self.camera
        rows = pixel_span(camera.row(high, z), camera.row(low, z), self.height)
        cols = pixel_span(camera.column(left, z), camera.column(right, z), self.width)
        u = (np.arange(cols.start, cols.stop, dtype=np.float32) + 0.5 - camera.center_x) * (z / camera.focal)
        y = np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5
        v = camera.height_m - (y - camera.horizon_y) * (z / camera.focal)
        return Surface(rows, cols, u[None, :], v[:, None], z, np.ones((len(v), len(u)), bool))

    def side(self, x: float, near: float, far: float, low: float, high: float) -> Surface:
        """Rectangle along the street at lateral position `x`; `u` = metres from `near`, `v` = height."""
        camera = self.camera
        cols = pixel_span(*sorted((camera.column(x, near), camera.column(x, far))), self.width)
        across = np.arange(cols.start, cols.stop, dtype=np.float32) + 0.5 - camera.center_x
        with np.errstate(divide="ignore"):
            z = np.clip(camera.focal * x / across, near, far)[None, :] if len(across) else np.ones((1, 0), np.float32)
        top = min(camera.row(high, near), camera.row(high, far))
        bottom = max(camera.row(low, near), camera.row(low, far))
        rows = pixel_span(top, bottom, self.height)
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
        v = camera.height_m - (y - camera.horizon_y) * (z / camera.focal)
        return Surface(rows, cols, z - near, v, z, (v >= low) & (v < high))

    def ground(self) -> Surface:
        """All pixels below the horizon; `u` = x of the world, `v` = `z` = metres ahead."""
        camera = self.camera
        rows = slice(min(max(math.ceil(camera.horizon_y + 0.5), 0), self.height), self.height)
        y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + 0.5
        z = np.minimum(camera.focal * camera.height_m / (y - camera.horizon_y), SKY_DEPTH - 1)
        x = (np.arange(self.width, dtype=np.float32)[None, :] + 0.5 - camera.center_x) * (z / camera.focal)
        return Surface(rows, slice(0, self.width), x, z, z, np.ones(x.shape, bool))

    def paint(
        self,
        surface: Surface,
        name: str,
        color: np.ndarray,
        temperature: float,
        shape: np.ndarray | bool = True,
        texture: float = 0.03,
    ) -> None:
        """Fill the pixels of `surface` where `shape` holds with class `name`; `texture` is relative colour grain."""
        mask = surface.inside & shape
        np.copyto(self.label[surface.box], CLASS_ID[name], where=mask)
        np.copyto(self.depth[surface.box], np.float32(surface.z), where=mask)
        self.tint(surface, color, temperature, mask, texture)

    def tint(
        self,
        surface: Surface,
        color: np.ndarray,
        temperature: float | None = None,
        shape: np.ndarray | bool = True,
        texture: float = 0.0,
    ) -> None:
        """Change colour and temperature only: a detail of an object that has been painted."""
        mask = surface.inside & shape
        shade = 1 + texture * self.grain[surface.box]
        np.copyto(self.color[surface.box], np.float32(color) * shade[..., None], where=mask[..., None])
        if temperature is not None:
            np.copyto(self.temperature[surface.box], temperature * (0.5 + 0.5 * shade), where=mask)


def disc(surface: Surface, u: float, v: float, radius_u: float, radius_v: float | None = None) -> np.ndarray:
    """Ellipse around (u, v) on a surface, as a mask."""
    return ((surface.u - u) / radius_u) ** 2 + ((surface.v - v) / (radius_v or radius_u)) ** 2 < 1


def rectangle(surface: Surface, left: float, right: float, low: float, high: float) -> np.ndarray:
    """Upright rectangle on a surface, as a mask."""
    return (surface.u >= left) & (surface.u < right) & (surface.v >= low) & (surface.v < high)


def limb(surface: Surface, start: tuple[float, float], end: tuple[float, float], radius: float) -> np.ndarray:
    """Capsule between two points (u, v) of a surface, as a mask."""
    du, dv = end[0] - start[0], end[1] - start[1]
    along = ((surface.u - start[0]) * du + (surface.v - start[1]) * dv) / (du * du + dv * dv)
    along = np.clip(along, 0, 1)
    return (surface.u - start[0] - along * du) ** 2 + (surface.v - start[1] - along * dv) ** 2 < radius**2
