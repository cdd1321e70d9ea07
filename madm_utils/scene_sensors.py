"""What four sensors see of a painted scene: colour camera, depth, thermal infrared, event camera.

Each function takes the painted `Canvas`, the `Weather` and a generator for its noise, and returns float32 in [0, 1],
(H, W, 3) for RGB and (H, W) for the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from madm_utils.scene_canvas import REFERENCE_HEIGHT, SKY_DEPTH, Canvas, smooth_noise

NEAREST_DEPTH = 2.0
"""Metres shown as black by the depth sensor; `SKY_DEPTH` is white."""
MAX_EVENT_FLOW = 3.5
"""Pixels (of a 128-pixel picture) of image motion at most between two event pictures."""
LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Weather:
    """Daylight and air of a scene."""

    brightness: float
    tint: np.ndarray
    zenith: np.ndarray
    horizon: np.ndarray
    clouds: float
    """Strength of the clouds, 0 to 1."""
    haze_distance: float
    """Metres after which 63 % of the light is haze."""
    sun_side: float
    """+1: the sun stands on the right, so the facades on the left are lit; -1 the reverse; 0 overcast."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Weather":
        kind = rng.choice(["sunny", "overcast", "evening"], p=[0.5, 0.3, 0.2])
        sun_side = 0.0 if kind == "overcast" else float(rng.choice([-1, 1]))
        blue, grey = np.array([0.3, 0.5, 0.85]), np.full(3, 0.7)
        if kind == "sunny":
            look = (rng.uniform(0.9, 1.15), rng.uniform(0.95, 1.05, 3), blue, np.array([0.75, 0.85, 0.95]))
            return cls(*look, rng.uniform(0.1, 0.7), rng.uniform(120, 350), sun_side)
        if kind == "overcast":
            look = (rng.uniform(0.75, 1.0), rng.uniform(0.95, 1.03, 3), grey * rng.uniform(0.8, 1.1), grey * 1.15)
            return cls(*look, rng.uniform(0.2, 0.6), rng.uniform(60, 180), sun_side)
        warm = np.array([1.12, 0.96, 0.82]) * rng.uniform(0.97, 1.03, 3)
        look = (rng.uniform(0.6, 0.85), warm, blue * 0.9, np.array([1.0, 0.75, 0.55]))
        return cls(*look, rng.uniform(0.2, 0.8), rng.uniform(90, 250), sun_side)


def _box_blur_rows(image: np.ndarray, radius: int) -> np.ndarray:
    """Mean over 2*radius+1 rows by running sums, edges repeated."""
    padded = np.pad(image, ((radius + 1, radius), (0, 0)), mode="edge")
    sums = np.cumsum(padded, axis=0, dtype=np.float64)
    size = 2 * radius + 1
    return ((sums[size:] - sums[:-size]) / size).astype(np.float32)


def box_blur(image: np.ndarray, radius: int) -> np.ndarray:
    """Square mean filter of (H, W) float32."""
    if radius < 1:
        return image
    return np.ascontiguousarray(_box_blur_rows(_box_blur_rows(image, radius).T, radius).T)


def _scale(canvas: Canvas) -> float:
    """Pixels per pixel of a picture of the reference height."""
    return canvas.height / REFERENCE_HEIGHT


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _hazy_color(canvas: Canvas, weather: Weather) -> np.ndarray:
    haze = np.where(canvas.depth < SKY_DEPTH, 1 - np.exp(-canvas.depth / weather.haze_distance), 0)[..., None]
    color = canvas.color + (weather.horizon.astype(np.float32) - canvas.color) * haze.astype(np.float32)
    return color * np.float32(weather.brightness * weather.tint)


def rgb_image(canvas: Canvas, weather: Weather, rng: np.random.Generator) -> np.ndarray:
    """Colour camera: haze, daylight, a little sensor noise."""
    return _hazy_color(canvas, weather) + 0.012 * _noise(rng, canvas.color.shape)


def depth_image(canvas: Canvas, weather: Weather, rng: np.random.Generator) -> np.ndarray:
    """Depth sensor: logarithm of the distance, far = bright, with noise and black holes along far edges."""
    depth = np.log(canvas.depth / NEAREST_DEPTH) / np.log(SKY_DEPTH / NEAREST_DEPTH)
    value = np.clip(depth + rng.uniform(-0.02, 0.02) + 0.008 * _noise(rng, depth.shape), 0.01, 1)
    edge = np.abs(depth - box_blur(depth, max(1, round(_scale(canvas))))) > 0.12
    dropout = rng.random(depth.shape, dtype=np.float32)
    patchy = smooth_noise(rng, canvas.height, canvas.width, 24) > 2.6
    holes = (edge & (dropout < 0.12)) | (dropout < 0.0005) | (patchy & (canvas.depth < SKY_DEPTH))
    return np.where(holes, 0, value)


def infrared_image(canvas: Canvas, weather: Weather, rng: np.random.Generator) -> np.ndarray:
    """Thermal camera: soft picture of the temperatures with gain, column pattern and noise."""
    heat = box_blur(canvas.temperature, round(0.6 * _scale(canvas)))
    columns = 0.008 * _noise(rng, (1, canvas.width))
    drift = 0.02 * smooth_noise(rng, canvas.height, canvas.width, 3)
    gain, offset = rng.uniform(0.88, 1.08), rng.uniform(-0.05, 0.05)
    return heat * gain + offset + columns + drift + 0.015 * _noise(rng, heat.shape)


def event_image(canvas: Canvas, weather: Weather, rng: np.random.Generator) -> np.ndarray:
    """Event camera, edge form: pixels whose log brightness changes as the car moves, on black, with shot noise.

    The change is `|flow . gradient(log I)|`, with the image motion of a car that drives on and turns a little.
    """
    camera, scale = canvas.camera, _scale(canvas)
    luminance = np.maximum(_hazy_color(canvas, weather) @ LUMINANCE, 0)
    # Blurred in proportion to the size, an edge spans the same part of any picture and the threshold fits all sizes.
    log_light = np.log(box_blur(luminance, round(0.7 * scale)) + 0.06)
    down, right = np.gradient(log_light)
    y, x = np.ogrid[: canvas.height, : canvas.width]
    advance, turn = rng.uniform(0.4, 0.9), rng.choice([-1, 1]) * rng.uniform(0.008, 0.02) * camera.focal
    flow_x = (x + 0.5 - camera.center_x) * advance / canvas.depth + turn
    flow_y = (y + 0.5 - camera.horizon_y) * advance / canvas.depth + 0.4 * turn * rng.uniform(-1, 1)
    # Near the car the motion would cover every grain of the asphalt; event windows are shortened when much moves.
    limit = np.minimum(1, MAX_EVENT_FLOW * scale / (np.hypot(flow_x, flow_y) + 1e-6))
    change = np.abs(flow_x * right + flow_y * down) * limit
    draw = rng.random(change.shape, dtype=np.float32)
    threshold = rng.uniform(0.075, 0.12)
    fired = (change > threshold) & (draw > 0.08)
    strength = np.clip(0.5 + 1.5 * change, 0, 1)
    return np.where(fired, strength, np.where(draw > 0.995, 0.6, 0))


SENSORS: dict[str, Callable[[Canvas, Weather, np.random.Generator], np.ndarray]] = {
    "rgb": rgb_image,
    "depth": depth_image,
    "infrared": infrared_image,
    "event": event_image,
}
