"""Where things stand in a procedural street scene: the street itself, the lots beside it, traffic and people.

All random draws happen here, in metres and in a fixed order, so a scene does not depend on the size of its picture.
"""

from dataclasses import dataclass, replace

import numpy as np

from madm_utils.scene_canvas import SKY_DEPTH, Canvas, Surface, smooth_noise
from madm_utils.scene_objects import (
    FACADES,
    SIGN_FACES,
    Barrier,
    Building,
    Car,
    Person,
    Pole,
    SceneObject,
    Sign,
    Tree,
)
from madm_utils.scene_sensors import Weather

STREET_END = 80.0
"""Metres; the last lots end here, and a skyline stands at `SKYLINE`."""
SKYLINE = 110.0
SIDES = (-1, 1)
LOT_KINDS = ("building", "park", "wall", "fence")
LOT_SHARES = (0.58, 0.18, 0.12, 0.12)
WELL_VISIBLE = (8.0, 21.0)
"""Metres; a lot that begins here is in view and large, also in a square picture."""
VIEW_SLOPE = 1.6
"""An object at lateral distance x is in view of a square picture from about z = 1.6 x on."""
MARKING = np.array([0.85, 0.85, 0.82])


@dataclass(frozen=True)
class Street:
    """Cross-section (x in metres, camera at 0) and surface of the road."""

    left: float
    right: float
    left_walk: float
    """Outer edge of the left sidewalk."""
    right_walk: float
    asphalt: float
    paving: np.ndarray
    grass: np.ndarray
    crossing: float
    """Distance of the zebra crossing; beyond the view when there is none."""
    dash_phase: float
    shadow: float
    """Metres of road in the shadow of the houses, from the edge where the sun stands."""
    warmth: float
    """Temperature of the ground."""

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Street":
        left, right = -rng.uniform(3.4, 5.4), rng.uniform(2.3, 3.5)
        return cls(
            left=left,
            right=right,
            left_walk=left - rng.uniform(1.8, 3.4),
            right_walk=right + rng.uniform(1.8, 3.4),
            asphalt=rng.uniform(0.26, 0.38),
            paving=np.array([0.58, 0.55, 0.52]) * rng.uniform(0.85, 1.2) * rng.uniform(0.96, 1.04, 3),
            grass=np.array([0.28, 0.4, 0.16]) * rng.uniform(0.8, 1.15),
            crossing=rng.uniform(7, 16) if rng.random() < 0.35 else SKY_DEPTH,
            dash_phase=rng.uniform(0, 6),
            shadow=rng.uniform(0.5, 4),
            warmth=rng.uniform(0.3, 0.42),
        )

    def edge(self, side: int) -> float:
        """Edge of the road on `side` (-1 left, 1 right)."""
        return self.right if side > 0 else self.left

    def walk(self, side: int) -> float:
        """Outer edge of the sidewalk on `side`."""
        return self.right_walk if side > 0 else self.left_walk

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2


def paint_sky(canvas: Canvas, weather: Weather, rng: np.random.Generator) -> None:
    """Sky from zenith to horizon with clouds, over the whole picture."""
    up = np.clip(1 - np.arange(canvas.height) / canvas.camera.horizon_y, 0, 1)[:, None, None]
    sky = weather.horizon + (weather.zenith - weather.horizon) * up**0.6
    noise = smooth_noise(rng, canvas.height, canvas.width, 5)
    noise = noise + 0.6 * smooth_noise(rng, canvas.height, canvas.width, 14)
    cloud = weather.clouds * np.clip(noise * 0.6, 0, 1)[..., None]
    canvas.color[:] = sky + (np.minimum(weather.horizon * 1.15, 1) - sky) * cloud
    canvas.temperature[:] = 0.06 + 0.1 * (1 - up[..., 0]) + 0.12 * cloud[..., 0]


def paint_ground(canvas: Canvas, weather: Weather, street: Street) -> None:
    """Grass, sidewalks and the road with its markings and the shadow of the houses."""
    ground = canvas.ground()
    x, z = ground.u, ground.v
    on_road = (x > street.left) & (x < street.right)
    on_walk = (x > street.left_walk) & (x < street.right_walk) & ~on_road
    canvas.paint(ground, "vegetation", street.grass, 0.25, texture=0.12)
    canvas.paint(ground, "sidewalk", street.paving, street.warmth + 0.03, on_walk, 0.04)
    slab = (np.modf(np.abs(x) / 1.2)[0] < 0.06) | (np.modf(z / 1.2)[0] < 0.06)
    canvas.tint(ground, street.paving * 0.82, None, slab & on_walk & (z < 14))
    canvas.paint(ground, "road", np.full(3, street.asphalt), street.warmth + 0.09, on_road, 0.04)
    _paint_markings(canvas, ground, street, on_road)
    if weather.sun_side:
        edge = street.edge(int(weather.sun_side))
        shaded = ((x - edge) * weather.sun_side > -street.shadow) & (on_road | on_walk)
        np.copyto(canvas.color[ground.box], canvas.color[ground.box] * 0.62, where=shaded[..., None])


def _paint_markings(canvas: Canvas, ground: Surface, street: Street, on_road: np.ndarray) -> None:
    x, z = ground.u, ground.v
    kerb = ((x > street.left) & (x < street.left + 0.18)) | ((x < street.right) & (x > street.right - 0.18))
    canvas.tint(ground, street.paving * 1.25, None, kerb)
    dashes = (np.abs(x - street.middle) < 0.09) & (np.modf((z + street.dash_phase) / 6)[0] < 0.5)
    canvas.tint(ground, MARKING, street.warmth + 0.05, dashes, 0.05)
    zebra = (np.abs(z - street.crossing) < 1.5) & on_road & (np.modf((x - street.left) / 1.0)[0] < 0.5)
    canvas.tint(ground, MARKING, street.warmth + 0.05, zebra, 0.05)


def _facade_light(weather: Weather, side: int) -> float:
    """Facades face the sun when it stands on the other side of the street."""
    return {0.0: 0.85, -float(side): 1.05, float(side): 0.6}[weather.sun_side]


def _sample_building(
    rng: np.random.Generator, z: float, x: float, length: float, height: float, light: float
) -> Building:
    return Building(
        z=z,
        x=x,
        length=length,
        height=height,
        color=FACADES[rng.integers(len(FACADES))] * rng.uniform(0.85, 1.15),
        temperature=rng.uniform(0.3, 0.42),
        floor=rng.uniform(2.8, 3.4),
        bay=rng.uniform(2.0, 3.2),
        lit=rng.choice([0.03, 0.2]),
        seed=rng.uniform(0, 10),
        side_light=light,
        front_light=rng.uniform(0.7, 0.95),
    )


def _sample_kinds(rng: np.random.Generator, starts: list[list[float]]) -> list[list[str]]:
    """Kinds of the lots of both sides. Walls and fences are given a well visible lot in most scenes."""
    kinds = [[str(kind) for kind in rng.choice(LOT_KINDS, size=len(side), p=LOT_SHARES)] for side in starts]
    visible = [
        (side, lot)
        for side, near in enumerate(starts)
        for lot, z in enumerate(near)
        if WELL_VISIBLE[0] < z < WELL_VISIBLE[1]
    ]
    places = rng.permutation(len(visible))
    for kind, place, draw in zip(("wall", "fence"), places, rng.random(2), strict=False):
        side, lot = visible[place]
        if draw < 0.75:
            kinds[side][lot] = kind
    return kinds


def sample_background(rng: np.random.Generator, weather: Weather, street: Street) -> list[SceneObject]:
    """Skyline and the lots on both sides, in the order to paint them."""
    skyline: list[SceneObject] = []
    for x in np.arange(-98.0, 99.0, 14.0):
        # A building reaches away from the street; the two in the middle meet at x = 0.
        inner = x if abs(x) > 1 else 0.01
        skyline.append(_sample_building(rng, SKYLINE, inner, 10, rng.uniform(5, 16), 0.8))
    skyline.append(_sample_building(rng, SKYLINE, -0.01, 10, rng.uniform(5, 12), 0.8))
    skyline += [Tree.sample(rng, SKYLINE - 5, rng.uniform(-30, 30)) for _ in range(6)]
    edges = []
    for _ in SIDES:
        lengths = rng.uniform(7, 14, 12)
        edges.append([float(z) for z in 2 + np.concatenate([[0], np.cumsum(lengths)]) if z < STREET_END])
    kinds = _sample_kinds(rng, [near[:-1] for near in edges])
    for side, near, side_kinds in zip(SIDES, edges, kinds, strict=True):
        for lot in reversed(range(len(side_kinds))):
            skyline += _sample_lot(rng, weather, street, side, near[lot], near[lot + 1], side_kinds[lot])
    return skyline


def _sample_lot(
    rng: np.random.Generator, weather: Weather, street: Street, side: int, near: float, far: float, kind: str
) -> list[SceneObject]:
    light, x, length = _facade_light(weather, side), street.walk(side), far - near
    if kind == "building":
        return [_sample_building(rng, near, x + side * rng.uniform(0, 1.2), length, rng.uniform(5, 15), light)]
    items: list[SceneObject] = []
    if rng.random() < 0.4:
        setback = x + side * rng.uniform(7, 11)
        items.append(_sample_building(rng, near + 1, setback, length - 2, rng.uniform(4, 10), light))
    trees = [
        Tree.sample(rng, rng.uniform(near, far), x + side * rng.uniform(2, 7), bool(rng.random() < 0.3))
        for _ in range(rng.integers(1, 4))
    ]
    items += sorted(trees, key=lambda tree: -tree.z)
    if kind in ("wall", "fence"):
        items.append(Barrier.sample(rng, near, x, length, kind, light))
    return items


def _place(rng: np.random.Generator, x: float, reach: float) -> float:
    """Distance for something at lateral position `x`: in view, up to `reach` metres further, more often near."""
    return VIEW_SLOPE * abs(x) + reach * rng.random() ** 1.4


def sample_actors(rng: np.random.Generator, weather: Weather, street: Street) -> list[SceneObject]:
    """Everything that stands on road and sidewalks, in no order."""
    return [
        *_sample_cars(rng, street),
        *_sample_people(rng, street),
        *_sample_furniture(rng, street),
        *_sample_kerb_fence(rng, weather, street),
    ]


def _sample_cars(rng: np.random.Generator, street: Street) -> list[SceneObject]:
    cars: list[SceneObject] = []
    lanes = ((street.middle + 1.5, False), (street.middle - 1.4, True))
    for lane, oncoming in lanes:
        z = rng.uniform(7, 20)
        for _ in range(rng.integers(0, 3)):
            cars.append(Car.sample(rng, z, lane + rng.uniform(-0.3, 0.3), oncoming, driving=True))
            z += rng.uniform(8, 20)
    for side in SIDES:
        x = street.edge(side) - side * 1.15
        z = rng.uniform(5, 16)
        for _ in range(rng.integers(0, 4)):
            cars.append(Car.sample(rng, z, x, oncoming=side < 0, driving=False))
            z += rng.uniform(5, 9)
    return cars


def _sample_people(rng: np.random.Generator, street: Street) -> list[SceneObject]:
    people: list[SceneObject] = []
    for _ in range(rng.integers(4, 10)):
        side = int(rng.choice(SIDES))
        x = rng.uniform(*sorted((street.edge(side) + side * 0.3, street.walk(side) - side * 0.4)))
        people.append(Person.sample(rng, _place(rng, x, 8), x))
    if street.crossing < SKY_DEPTH:
        for _ in range(rng.integers(0, 3)):
            z = street.crossing + rng.uniform(-1.2, 1.2)
            people.append(Person.sample(rng, z, rng.uniform(street.left + 0.5, street.right - 0.5)))
    return people


def _sample_furniture(rng: np.random.Generator, street: Street) -> list[SceneObject]:
    items: list[SceneObject] = []
    for side in SIDES:
        edge = street.edge(side)
        for _ in range(rng.integers(1, 4)):
            x = edge + side * 0.4
            arm = -side * rng.uniform(0.9, 1.9) if rng.random() < 0.7 else 0.0
            grey = np.full(3, rng.uniform(0.3, 0.6)) * rng.uniform(0.95, 1.05, 3)
            items.append(Pole(_place(rng, x, 20), x, rng.uniform(4.2, 6.5), rng.uniform(0.14, 0.22), arm, grey))
        for _ in range(rng.integers(1, 3)):
            x = edge + side * rng.uniform(0.4, 1.0)
            kind = str(rng.choice(list(SIGN_FACES)))
            items.append(Sign(_place(rng, x, 8), x, rng.uniform(2.2, 3.0), rng.uniform(1.0, 1.5), kind))
        for _ in range(rng.integers(0, 3)):
            x = street.walk(side) - side * 0.5
            items.append(Tree.sample(rng, _place(rng, x, 30), x))
    return items


def _sample_kerb_fence(rng: np.random.Generator, weather: Weather, street: Street) -> list[SceneObject]:
    if rng.random() > 0.45:
        return []
    side = int(rng.choice(SIDES))
    x = street.edge(side) + side * 0.25
    light = _facade_light(weather, side)
    rail = Barrier.sample(rng, rng.uniform(4, 9), x, rng.uniform(4, 12), "fence", light)
    return list(replace(rail, height=1.1).pieces())
