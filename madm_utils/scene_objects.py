"""The things that stand in a procedural street scene. Each is sampled once, in metres, and draws itself on a canvas.

Temperatures run from 0 (clear sky) to 1 (skin), colours from 0 to 1 in full daylight.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from madm_utils.scene_canvas import CLASS_ID, Canvas, Surface, disc, limb, rectangle

GLASS = np.array([0.13, 0.16, 0.2])
RUBBER = np.array([0.05, 0.05, 0.06])
BARK = np.array([0.3, 0.23, 0.17])
CAR_PAINTS = np.array(
    [[0.85, 0.85, 0.87], [0.55, 0.57, 0.6], [0.1, 0.1, 0.12], [0.62, 0.1, 0.1], [0.12, 0.22, 0.5], [0.25, 0.35, 0.3],
     [0.75, 0.7, 0.6]]
)  # fmt: skip
FACADES = np.array(
    [[0.72, 0.62, 0.48], [0.62, 0.36, 0.28], [0.75, 0.72, 0.68], [0.5, 0.48, 0.46], [0.78, 0.66, 0.44],
     [0.6, 0.55, 0.58]]
)  # fmt: skip
SIGN_FACES = {
    "stop": ([0.8, 0.08, 0.1], [0.95, 0.95, 0.95]),
    "limit": ([0.85, 0.1, 0.12], [0.95, 0.95, 0.95]),
    "order": ([0.08, 0.25, 0.7], [0.95, 0.95, 0.95]),
    "warning": ([0.9, 0.75, 0.1], [0.1, 0.1, 0.1]),
    "board": ([0.9, 0.8, 0.15], [0.08, 0.08, 0.08]),
    "light": ([0.06, 0.07, 0.07], [0.95, 0.2, 0.1]),
}


class SceneObject(Protocol):
    """Anything that draws itself; `z` is the distance by which objects are sorted, far ones first."""

    z: float

    def draw(self, canvas: Canvas) -> None: ...


def cell_hash(column: np.ndarray, row: np.ndarray, seed: float) -> np.ndarray:
    """Pseudo-random number in [0, 1) for each cell of a grid: the same window is always lit or always dark."""
    return np.modf(np.abs(np.sin(column * 12.9898 + row * 78.233 + seed * 37.719) * 43758.547))[0]


@dataclass
class Building:
    """Box with one facade along the street (at `x`) and one facing the camera (at distance `z`)."""

    z: float
    x: float
    length: float
    height: float
    color: np.ndarray
    temperature: float
    floor: float
    bay: float
    lit: float
    """Share of the windows with a lamp on."""
    seed: float
    side_light: float
    front_light: float

    WIDTH = 14.0

    def draw(self, canvas: Canvas) -> None:
        outer = self.x + np.copysign(self.WIDTH, self.x)
        along = canvas.side(self.x, self.z, self.z + self.length, 0, self.height)
        across = canvas.front(min(self.x, outer), max(self.x, outer), 0, self.height, self.z)
        self._facade(canvas, along, self.side_light)
        self._facade(canvas, across, self.front_light)

    def _facade(self, canvas: Canvas, wall: Surface, light: float) -> None:
        color = self.color * light
        canvas.paint(wall, "building", color, self.temperature)
        u, v = wall.u - self.x, wall.v - 0.6
        column, story = np.floor(u / self.bay), np.floor(v / self.floor)
        in_u, in_v = u / self.bay - column, v / self.floor - story
        ledge = (np.abs(v - np.round(v / self.floor) * self.floor) < 0.13) | (wall.v > self.height - 0.45)
        canvas.tint(wall, color * 0.72, None, ledge)
        window = (in_u > 0.26) & (in_u < 0.76) & (in_v > 0.24) & (in_v < 0.8) & (v < self.height - 1.4)
        shop = (story == 0) & (in_u > 0.08) & (in_u < 0.92) & (in_v < 0.8) & (v > -0.4)
        glass = (window & (story > 0)) | shop
        hashed = cell_hash(column, story, self.seed)
        reflection = (0.35 + 0.9 * hashed)[..., None] * GLASS
        panes = np.where((hashed < self.lit)[..., None], np.array([1.0, 0.85, 0.5]), reflection * (0.5 + light))
        canvas.tint(wall, panes, self.temperature + 0.09, glass)


@dataclass
class Tree:
    """Trunk and a crown of leafy ellipses `(x, y, radius_x, radius_y, shade)`; a bush has no trunk."""

    z: float
    x: float
    trunk: float
    crown: list[tuple[float, float, float, float, float]]
    color: np.ndarray
    temperature: float

    @classmethod
    def sample(cls, rng: np.random.Generator, z: float, x: float, bush: bool = False) -> "Tree":
        trunk = 0.0 if bush else rng.uniform(1.9, 3.0)
        size = rng.uniform(0.6, 1.0) if bush else rng.uniform(1.2, 1.9)
        crown = []
        for step in range(7):
            dx, dy = rng.normal(0, 0.6 * size), rng.uniform(0.3, 1.6) * size
            radius = size * rng.uniform(0.55, 0.95)
            crown.append((x + dx, trunk + dy, radius, radius * rng.uniform(0.75, 1.0), 0.72 + 0.08 * step))
        green = np.array([0.2, 0.37, 0.13]) * rng.uniform(0.7, 1.4) + rng.uniform(0, 0.1, 3) * [1, 0.4, 0]
        return cls(z, x, trunk, crown, green, rng.uniform(0.24, 0.32))

    def draw(self, canvas: Canvas) -> None:
        if self.trunk:
            half = max(0.16, canvas.min_thickness(self.z) / 2)
            stem = canvas.front(self.x - half, self.x + half, 0, self.trunk + 0.5, self.z)
            canvas.paint(stem, "vegetation", BARK, self.temperature + 0.03)
        for x, y, radius_x, radius_y, shade in self.crown:
            box = canvas.front(x - radius_x, x + radius_x, max(0, y - radius_y), y + radius_y, self.z)
            leaves = disc(box, x, y, radius_x, radius_y)
            sunny = 0.75 + 0.45 * np.clip((box.v - y) / radius_y, -0.6, 1)
            canvas.paint(box, "vegetation", self.color * (shade * sunny)[..., None], self.temperature, leaves, 0.16)


@dataclass
class Barrier:
    """Piece of a `wall` (brick or concrete) or of a `fence` (posts and rails) along the street."""

    z: float
    x: float
    length: float
    height: float
    kind: str
    color: np.ndarray
    temperature: float
    light: float

    @classmethod
    def sample(cls, rng: np.random.Generator, z: float, x: float, length: float, kind: str, light: float) -> "Barrier":
        if kind == "wall":
            color = rng.choice([[0.58, 0.3, 0.24], [0.62, 0.6, 0.57], [0.48, 0.42, 0.36]]) * rng.uniform(0.8, 1.15)
            return cls(z, x, length, rng.uniform(1.8, 2.7), kind, color, rng.uniform(0.36, 0.42), light)
        color = rng.choice([[0.2, 0.22, 0.2], [0.85, 0.85, 0.82], [0.5, 0.36, 0.22], [0.6, 0.62, 0.65]])
        return cls(z, x, length, rng.uniform(1.3, 1.9), kind, color, rng.uniform(0.2, 0.26), light)

    def pieces(self, step: float = 2.0) -> list["Barrier"]:
        """Cut into panels, so that each can be sorted by its own distance among people and cars."""
        starts = np.arange(self.z, self.z + self.length - 1e-6, step)
        shared = (self.height, self.kind, self.color, self.temperature, self.light)
        return [Barrier(z, self.x, min(step, self.z + self.length - z), *shared) for z in starts]

    def draw(self, canvas: Canvas) -> None:
        face = canvas.side(self.x, self.z, self.z + self.length, 0, self.height)
        if self.kind == "wall":
            self._wall(canvas, face)
        else:
            self._fence(canvas, face)

    def _wall(self, canvas: Canvas, face: Surface) -> None:
        color = self.color * self.light
        canvas.paint(face, "wall", color, self.temperature, texture=0.05)
        course = np.floor(face.v / 0.3)
        joint = (face.v / 0.3 - course < 0.16) | (np.modf((self.z + face.u) / 0.8 + 0.5 * (course % 2))[0] < 0.07)
        canvas.tint(face, color * 0.8, None, joint)
        canvas.tint(face, color * 1.25, None, face.v > self.height - 0.18)

    def _fence(self, canvas: Canvas, face: Surface) -> None:
        """The label covers the gaps too, as human annotators draw fences; colour and heat shine through them."""
        along = np.modf((self.z + face.u) / 0.55)[0]
        rails = (np.abs(face.v - 0.25) < 0.1) | (face.v > self.height - 0.16)
        solid = (along < 0.4) | rails
        behind = canvas.depth[face.box].copy()
        shadowed = canvas.color[face.box] * 0.75
        heat = canvas.temperature[face.box].copy()
        canvas.paint(face, "fence", np.where(solid[..., None], self.color * self.light, shadowed), self.temperature)
        np.copyto(canvas.depth[face.box], behind, where=face.inside & ~solid)
        np.copyto(canvas.temperature[face.box], heat, where=face.inside & ~solid)


@dataclass
class Car:
    """Vehicle seen from behind (or ahead, when `oncoming`) with its visible flank."""

    z: float
    x: float
    color: np.ndarray
    oncoming: bool
    driving: bool
    van: bool

    WIDTH, LENGTH, WHEEL = 1.8, 4.2, 0.33

    @classmethod
    def sample(cls, rng: np.random.Generator, z: float, x: float, oncoming: bool, driving: bool) -> "Car":
        color = CAR_PAINTS[rng.integers(len(CAR_PAINTS))] * rng.uniform(0.85, 1.1)
        return cls(z, x, color, oncoming, driving, bool(rng.random() < 0.2))

    @property
    def height(self) -> float:
        return 2.2 if self.van else 1.48

    def draw(self, canvas: Canvas) -> None:
        half = self.WIDTH / 2
        shadow = canvas.front(self.x - half, self.x + half, -0.12, 0.3, self.z)
        canvas.tint(shadow, np.array([0.08, 0.08, 0.09]), 0.4, canvas.label[shadow.box] == CLASS_ID["road"])
        if abs(self.x) > half:
            flank = self.x - np.copysign(half, self.x)
            self._flank(canvas, canvas.side(flank, self.z, self.z + self.LENGTH, 0, self.height))
        self._end(canvas, canvas.front(self.x - half, self.x + half, 0, self.height, self.z))

    def _flank(self, canvas: Canvas, face: Surface) -> None:
        u = self.LENGTH - face.u if self.oncoming else face.u
        slope = 0.15 if self.van else 0.75
        cabin = (face.v >= 0.9) & (u > slope * (face.v - 0.9)) & (u < self.LENGTH - 1.0 - 1.1 * (face.v - 0.9))
        body = (face.v > 0.3) & (face.v < 0.92) | cabin
        wheels = np.zeros_like(face.inside)
        for axle in (0.8, self.LENGTH - 0.8):
            wheels |= (u - axle) ** 2 + (face.v - self.WHEEL) ** 2 < self.WHEEL**2
        canvas.paint(face, "car", self.color * 0.85, 0.4, body | wheels)
        pillar = np.abs(u - 1.9) < 0.08
        canvas.tint(face, GLASS, 0.3, cabin & (face.v > 1.0) & (face.v < self.height - 0.12) & ~pillar & (u > 0.35))
        canvas.tint(face, RUBBER, 0.6 if self.driving else 0.34, wheels)

    def _end(self, canvas: Canvas, face: Surface) -> None:
        x = face.u - self.x
        half = self.WIDTH / 2 - np.clip(face.v - 0.9, 0, None) * (0.05 if self.van else 0.3)
        body = (np.abs(x) < half) & (face.v > 0.28)
        wheels = (np.abs(np.abs(x) - 0.68) < 0.16) & (face.v < 0.4)
        canvas.paint(face, "car", self.color, 0.44, body | wheels)
        glass = (np.abs(x) < half - 0.14) & (face.v > 0.98) & (face.v < self.height - 0.13)
        canvas.tint(face, GLASS, 0.3, glass)
        canvas.tint(face, RUBBER, 0.6 if self.driving else 0.34, wheels)
        if self.driving:
            warm = (face.v > 0.42) & (face.v < 0.85) if self.oncoming else face.v < 0.5
            canvas.tint(face, self.color * 0.95, 0.72, warm & body)
        lamps = (np.abs(np.abs(x) - 0.68) < 0.2) & (np.abs(face.v - 0.74) < 0.1)
        canvas.tint(face, np.array([1.0, 0.96, 0.8] if self.oncoming else [0.85, 0.08, 0.06]), None, lamps)
        plate = (np.abs(x) < 0.28) & (np.abs(face.v - 0.52) < 0.07)
        canvas.tint(face, np.array([0.9, 0.9, 0.86]), None, plate)


@dataclass
class Person:
    """Standing or walking pedestrian."""

    z: float
    x: float
    height: float
    stride: float
    """Metres from the hip to either foot, sideways."""
    coat: np.ndarray
    trousers: np.ndarray
    skin: np.ndarray

    @classmethod
    def sample(cls, rng: np.random.Generator, z: float, x: float) -> "Person":
        coat = rng.uniform(0.1, 0.85, 3) if rng.random() < 0.6 else np.full(3, rng.uniform(0.08, 0.4))
        skin = np.array([0.85, 0.65, 0.52]) * rng.uniform(0.45, 1.05)
        trousers = np.full(3, rng.uniform(0.08, 0.35))
        return cls(z, x, rng.uniform(1.55, 1.92), rng.uniform(0.06, 0.3), coat, trousers, skin)

    def draw(self, canvas: Canvas) -> None:
        body = canvas.front(self.x - 0.5, self.x + 0.5, 0, self.height, self.z)
        x, scale = self.x, self.height / 1.75
        hip, shoulder = 0.88 * scale, 1.42 * scale
        thin = canvas.min_thickness(self.z, 1.0) / 2
        legs, arms = np.zeros_like(body.inside), np.zeros_like(body.inside)
        for side in (-1, 1):
            legs |= limb(body, (x + side * 0.09, hip), (x + side * self.stride, 0.07), max(0.1, thin))
            arms |= limb(body, (x + side * 0.22, shoulder - 0.04), (x + side * 0.31, hip), max(0.07, thin))
        torso = limb(body, (x, hip), (x, shoulder - 0.1), 0.22)
        head = disc(body, x, self.height - 0.14, 0.12, 0.15)
        canvas.paint(body, "person", self.trousers, 0.7, legs)
        canvas.paint(body, "person", self.coat * 0.85, 0.74, arms)
        canvas.paint(body, "person", self.coat, 0.78, torso)
        canvas.paint(body, "person", self.skin, 0.98, head)
        canvas.tint(body, self.trousers * 0.7, 0.85, head & (body.v > self.height - 0.1))


@dataclass
class Pole:
    """Post on the sidewalk, with a lamp on an arm over the road (`arm` metres, signed) or without."""

    z: float
    x: float
    height: float
    radius: float
    arm: float
    color: np.ndarray

    def draw(self, canvas: Canvas) -> None:
        half = max(self.radius, canvas.min_thickness(self.z, 2.0) / 2)
        post = canvas.front(self.x - half, self.x + half, 0, self.height, self.z)
        round_shade = 1.15 - 0.5 * np.abs(post.u - self.x)[..., None] / half
        canvas.paint(post, "pole", self.color * np.broadcast_to(round_shade, (*post.inside.shape, 1)), 0.3)
        canvas.tint(post, self.color * 0.7, 0.33, post.v < 0.8)
        if self.arm:
            left, right = sorted((self.x, self.x + self.arm))
            thick = max(0.16, canvas.min_thickness(self.z, 1.5))
            canvas.paint(canvas.front(left, right, self.height - thick, self.height, self.z), "pole", self.color, 0.3)
            tip = self.x + self.arm
            lamp = canvas.front(tip - 0.38, tip + 0.38, self.height - 0.14 - thick, self.height + 0.08, self.z)
            canvas.paint(lamp, "pole", self.color * 0.6, 0.42)
            canvas.tint(lamp, np.array([1.0, 0.93, 0.7]), 0.5, lamp.v < self.height - thick)


@dataclass
class Sign:
    """Traffic sign or traffic light on its own post; `kind` is a key of `SIGN_FACES`."""

    z: float
    x: float
    y: float
    size: float
    kind: str

    def draw(self, canvas: Canvas) -> None:
        Pole(self.z, self.x, self.y, 0.07, 0.0, np.array([0.55, 0.56, 0.58])).draw(canvas)
        half = self.size / 2
        tall = half * {"light": 1.5, "board": 0.8}.get(self.kind, 1.0)
        wide = half * {"light": 0.6, "board": 1.3}.get(self.kind, 1.0)
        plate = canvas.front(self.x - wide, self.x + wide, self.y - tall, self.y + tall, self.z)
        shape, inner = self._shapes(plate, half)
        rim, field = (np.array(color) for color in SIGN_FACES[self.kind])
        canvas.paint(plate, "traffic sign", rim, 0.5 if self.kind == "light" else 0.27, shape, texture=0.0)
        canvas.tint(plate, field, None, inner)

    def _shapes(self, plate: Surface, half: float) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the whole plate and of the part in the second colour."""
        u, v = plate.u - self.x, plate.v - self.y
        if self.kind == "stop":
            return np.abs(u) + np.abs(v) < 1.35 * half, (np.abs(v) < 0.22 * half) & (np.abs(u) < 0.7 * half)
        if self.kind == "limit":
            return disc(plate, self.x, self.y, half), disc(plate, self.x, self.y, 0.68 * half)
        if self.kind == "order":
            arrow = (np.abs(u) < 0.16 * half) & (np.abs(v) < 0.6 * half)
            return disc(plate, self.x, self.y, half), arrow
        if self.kind == "warning":
            return np.abs(u) < 0.55 * (half - v), (np.abs(u) < 0.3 * (half - v) - 0.2 * half) & (v > -0.5 * half)
        if self.kind == "light":
            return np.ones_like(plate.inside), disc(plate, self.x, self.y + 0.9 * half, 0.42 * half)
        stripes = rectangle(plate, self.x - 0.9 * half, self.x + 0.9 * half, self.y - 0.5 * half, self.y + 0.5 * half)
        return np.ones_like(plate.inside), stripes & (np.abs(v) > 0.15 * half)
