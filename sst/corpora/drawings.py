"""The embedded corpus: seeded drawings of one deformable creature whose landmarks are known exactly.

`draw(seed, index, size)` is a pure function; no file, download or global random state is involved. A drawing
is built in three steps, with random streams of their own, so that the scene never depends on the image size:

1. scene: outlines of all parts in object units (head half-width 1, x right, y down, z to the viewer), back to
   front;
2. camera: smooth deformation, yaw, pitch, perspective, roll, and a fit into the unit square;
3. picture: background, parts, light and grain, drawn at twice the size and averaged down.

The creature is asymmetric on purpose, so that left and right can be told apart. Hues vary freely; what stays
is the structure, and which details are darker or lighter than the skin they lie on.

Shape letters: N outline vertices, L landmarks, H W image height and width.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass, field
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Image = NDArray[np.uint8]
Colour = tuple[int, int, int]

LANDMARK_NAMES: Final[tuple[str, ...]] = (
    "pointed ear bead",
    "round ear centre",
    "ring antenna tip",
    "square antenna tip",
    "plain eye",
    "patched eye",
    "forehead gem",
    "nose",
    "mouth corner with dimple",
    "mouth corner with tooth",
    "plastered cheek",
    "striped cheek",
    "bow tie knot",
    "belly button",
    "spotted hand",
    "pincer hand",
)
MIN_SIZE: Final = 32

_SUPERSAMPLE: Final = 2
_SHIFT: Final = 4  # fractional bits of the vertex coordinates given to OpenCV
_HEAD_DEPTH: Final = 0.5  # half-depth of the ellipsoid that the face is drawn on
_NECK: Final = (0.0, 0.85)  # the head tilts about this point
_COVERABLE: Final = (4, 5, 7, 8, 9, 10, 11, 12, 13)  # what a raised hand may come to lie on


@dataclass(frozen=True, eq=False)
class ToyImage:
    """One drawing with its exact annotation.

    Attributes:
        image: RGB, uint8, (H, W, 3).
        points: landmarks (x, y) in pixels, pixel centres at integers, float32, (L, 2); in the order of
            `LANDMARK_NAMES`; given for hidden landmarks too.
        visible: whether no other part lies over the landmark, bool, (L,).
        box: (x0, y0, x1, y1) in pixels: a square that holds the whole object and a small margin.
    """

    image: Image
    points: NDArray[np.float32]
    visible: NDArray[np.bool_]
    box: tuple[float, float, float, float]


def draw(seed: int, index: int, size: int = 128) -> ToyImage:
    """Draws image `index` of the corpus `seed`; the same arguments always give the same drawing.

    The scene does not depend on `size`: in the normalised coordinates (x + 0.5) / size, points and box are
    the same at every size.

    Args:
        seed: names the corpus, >= 0.
        index: running number of the image, >= 0.
        size: height and width in pixels, at least `MIN_SIZE`.

    Returns:
        The image, its landmarks, their visibility and the object's box.

    Raises:
        ValueError: if an argument is out of range.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"toy image: seed and index must be >= 0, got seed={seed}, index={index}")
    if size < MIN_SIZE:
        raise ValueError(f"toy image: size must be at least {MIN_SIZE} pixels, got {size}")
    streams = [np.random.default_rng([seed, index, step]) for step in range(4)]
    shape_rng, camera_rng, paint_rng, grain_rng = streams  # grain draws as many numbers as there are pixels

    scene = _build_scene(shape_rng, _draw_palette(paint_rng))
    outlines, points_L2, box = _project(scene, camera_rng)
    visible_L = _find_visible(scene, outlines, points_L2)

    canvas = _paint_background(paint_rng, size * _SUPERSAMPLE)
    for shape, outline_N2 in zip(scene.shapes, outlines, strict=True):
        _paint_shape(canvas, shape, outline_N2, paint_rng)
    canvas = _soften(canvas, size, paint_rng)
    image = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    image = _light(image.astype(np.uint8, copy=False), paint_rng, grain_rng)

    x0, y0, x1, y1 = (float(v) for v in _to_pixels(np.asarray(box), size))
    return ToyImage(image, _to_pixels(points_L2, size).astype(np.float32), visible_L, (x0, y0, x1, y1))


# --- scene ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Palette:
    head: Colour
    body: Colour
    limb: Colour
    accent: Colour
    dark: Colour
    light: Colour


@dataclass(frozen=True, eq=False)
class _Shape:
    """A filled outline of one part: vertices (N, 2) and depths (N,) in object units."""

    part: str
    outline_N2: Floats
    depth_N: Floats
    colour: Colour
    textured: bool


@dataclass(eq=False)
class _Scene:
    """Shapes back to front; for each landmark its place, depth, part and how many shapes lie behind it."""

    shapes: list[_Shape] = field(default_factory=list)
    marks: dict[int, tuple[Floats, float, str, int]] = field(default_factory=dict)

    def add(self, part: str, outline_N2: Floats, depth: float | Floats, colour: Colour, textured: bool = False) -> None:
        depth_N = np.broadcast_to(np.asarray(depth, dtype=np.float64), outline_N2.shape[:1])
        self.shapes.append(_Shape(part, outline_N2, depth_N, colour, textured))

    def mark(self, landmark: int, part: str, point: Floats, depth: float) -> None:
        self.marks[landmark] = (point, depth, part, len(self.shapes))


def _draw_palette(rng: np.random.Generator) -> _Palette:
    """Any hues; values fixed in bands, so that details keep their sign of contrast against the skin."""

    def colour(saturation: tuple[float, float], value: tuple[float, float]) -> Colour:
        red, green, blue = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(*saturation), rng.uniform(*value))
        return int(255 * red), int(255 * green), int(255 * blue)

    return _Palette(
        head=colour((0.25, 0.7), (0.6, 0.8)),
        body=colour((0.25, 0.8), (0.5, 0.75)),
        limb=colour((0.3, 0.8), (0.5, 0.8)),
        accent=colour((0.6, 1.0), (0.35, 0.55)),
        dark=colour((0.2, 0.8), (0.04, 0.18)),
        light=colour((0.0, 0.18), (0.92, 1.0)),
    )


def _disc(centre: Floats, radius_x: float, radius_y: float | None = None, vertices: int = 24) -> Floats:
    angle_N = np.linspace(0.0, 2 * math.pi, vertices, endpoint=False)
    radius_y = radius_x if radius_y is None else radius_y
    return centre + np.stack([radius_x * np.cos(angle_N), radius_y * np.sin(angle_N)], axis=1)


def _rect(centre: Floats, half_x: float, half_y: float, angle: float = 0.0) -> Floats:
    corners_42 = np.array([[-half_x, -half_y], [half_x, -half_y], [half_x, half_y], [-half_x, half_y]])
    return centre + corners_42 @ _rotation(angle).T


def _band(curve_N2: Floats, half_width: float | Floats) -> Floats:
    """The outline of a ribbon along a curve."""
    tangent_N2 = np.gradient(curve_N2, axis=0)
    normal_N2 = np.stack([-tangent_N2[:, 1], tangent_N2[:, 0]], axis=1)
    normal_N2 /= np.linalg.norm(normal_N2, axis=1, keepdims=True) + 1e-9
    offset_N2 = normal_N2 * np.broadcast_to(np.asarray(half_width), curve_N2.shape[:1])[:, None]
    return np.concatenate([curve_N2 + offset_N2, (curve_N2 - offset_N2)[::-1]])


def _bezier(start: Floats, middle: Floats, end: Floats, vertices: int = 12) -> Floats:
    t_N1 = np.linspace(0.0, 1.0, vertices)[:, None]
    return (1 - t_N1) ** 2 * start + 2 * t_N1 * (1 - t_N1) * middle + t_N1**2 * end


def _rotation(angle: float) -> Floats:
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])


def _xy(x: float, y: float) -> Floats:
    return np.array([x, y], dtype=np.float64)


def _build_scene(rng: np.random.Generator, palette: _Palette) -> _Scene:
    scene = _Scene()
    head = _Head(rng)
    flops = rng.uniform() < 0.18  # the pointed ear hangs over the face
    arms_behind = [rng.uniform() < 0.15 for _ in range(2)]
    layout = _lay_out_face(rng)
    shoulders = [_xy(-0.5, 1.2), _xy(0.5, 1.2)]
    arms = [_pose_arm(rng, side, shoulders[side], layout, head) for side in range(2)]

    for side in range(2):
        if arms_behind[side]:
            _add_arm(scene, palette, side, arms[side], depth=-0.4)
    _add_antennas(scene, rng, palette, head)
    if not flops:
        _add_pointed_ear(scene, rng, palette, head, flops)
    _add_round_ear(scene, rng, palette, head)
    _add_body(scene, rng, palette)
    _add_head(scene, palette, head, layout, mouth_bend=rng.uniform(-0.12, 0.22))
    if flops:
        _add_pointed_ear(scene, rng, palette, head, flops)
    for side in range(2):
        if not arms_behind[side]:
            _add_arm(scene, palette, side, arms[side], depth=0.55)
    return scene


class _Head:
    """Proportions and tilt of the head; places points of the upright unit head in object units."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._stretch = np.array([rng.uniform(0.88, 1.12), rng.uniform(0.88, 1.1)])
        self._turn = _rotation(math.radians(rng.uniform(-16, 16)))
        self._shift = np.array([rng.uniform(-0.12, 0.12), rng.uniform(-0.08, 0.04)])

    def place(self, points: Floats) -> Floats:
        placed: Floats = (points * self._stretch - _NECK) @ self._turn.T + _NECK + self._shift
        return placed

    @staticmethod
    def depth(points: Floats) -> Floats:
        """Depth of the face's surface over points of the upright unit head."""
        rest = 1.0 - np.sum(np.square(points), axis=-1)
        return np.asarray(_HEAD_DEPTH * np.sqrt(np.maximum(rest, 0.0)), dtype=np.float64)


def _lay_out_face(rng: np.random.Generator) -> dict[int, Floats]:
    """Centres of the face's landmarks on the upright unit head."""
    gap, eye_y = rng.uniform(0.36, 0.46), rng.uniform(-0.22, -0.06)
    mouth_x, mouth_y, mouth_slant = rng.uniform(0.32, 0.5), rng.uniform(0.5, 0.62), rng.uniform(-0.07, 0.07)
    jitter = rng.uniform(-0.035, 0.035, size=(8, 2))
    return {
        4: _xy(-gap, eye_y) + jitter[0],
        5: _xy(gap, eye_y) + jitter[1],
        6: _xy(0.0, rng.uniform(-0.68, -0.55)) + jitter[2],
        7: _xy(0.0, rng.uniform(0.12, 0.24)) + jitter[3],
        8: _xy(-mouth_x, mouth_y - mouth_slant) + jitter[4],
        9: _xy(mouth_x, mouth_y + mouth_slant) + jitter[5],
        10: _xy(-0.62, rng.uniform(0.22, 0.32)) + jitter[6],
        11: _xy(0.64, rng.uniform(0.2, 0.3)) + jitter[7],
    }


def _add_head(scene: _Scene, palette: _Palette, head: _Head, layout: dict[int, Floats], mouth_bend: float) -> None:
    def face(outline_N2: Floats, colour: Colour) -> None:
        scene.add("head", head.place(outline_N2), head.depth(outline_N2), colour)

    def mark(landmark: int) -> None:
        scene.mark(landmark, "head", head.place(layout[landmark]), float(head.depth(layout[landmark])))

    dark, light, accent = palette.dark, palette.light, palette.accent
    outline_N2 = _disc(_xy(0, 0), 1.0, vertices=48)
    scene.add("head", head.place(outline_N2 * 1.03), -0.02, dark)
    scene.add("head", head.place(outline_N2 * 0.98), 0.0, palette.head, textured=True)

    face(_rect(layout[10], 0.2, 0.17), dark)
    face(_rect(layout[10], 0.145, 0.115), light)
    mark(10)
    for offset in (-0.15, 0.0, 0.15):  # stripes
        half_height = 0.2 if offset == 0 else 0.14
        face(_rect(layout[11] + _xy(offset, 0), 0.042, half_height, angle=0.25), dark)
    mark(11)
    face(_disc(layout[4], 0.25), dark)
    face(_disc(layout[4], 0.215), light)
    face(_disc(layout[4], 0.1), dark)
    mark(4)
    face(_disc(layout[5], 0.29, 0.26), dark)
    face(_rect(layout[5], 0.19, 0.055, angle=math.pi / 4), light)
    face(_rect(layout[5], 0.19, 0.055, angle=-math.pi / 4), light)
    mark(5)
    gem = np.array([[0, -0.21], [0.14, 0], [0, 0.21], [-0.14, 0]])
    face(layout[6] + gem, dark)
    face(layout[6] + gem * 0.7, light)
    mark(6)
    face(layout[7] + np.array([[-0.19, -0.12], [0.19, -0.12], [0.0, 0.17]]), dark)
    mark(7)
    middle = (layout[8] + layout[9]) / 2 + _xy(0, 2 * mouth_bend)
    curve_N2 = _bezier(layout[8], middle, layout[9])
    face(_band(curve_N2, 0.055), accent)
    face(_disc(layout[8], 0.12), dark)
    mark(8)
    face(layout[9] + np.array([[-0.17, -0.09], [0.13, -0.09], [0.13, 0.02], [0.0, 0.2], [-0.13, 0.02]]), dark)
    face(layout[9] + np.array([[-0.1, -0.05], [0.09, -0.05], [0.0, 0.13]]), light)
    mark(9)


def _add_antennas(scene: _Scene, rng: np.random.Generator, palette: _Palette, head: _Head) -> None:
    for landmark, part, sign in ((2, "ring antenna", -1.0), (3, "square antenna", 1.0)):
        root = _xy(0.2 * sign, -0.85)
        lean = math.radians(rng.uniform(-5, 42)) * sign
        length = rng.uniform(0.62, 0.95)
        tip = root + length * _xy(math.sin(lean), -math.cos(lean))
        middle = root + _xy(rng.uniform(-0.15, 0.15), -0.45)
        stalk = _bezier(root, middle, tip)
        scene.add(part, head.place(_band(stalk, 0.06)), 0.05, palette.dark)
        if landmark == 2:
            scene.add(part, head.place(_disc(tip, 0.22)), 0.1, palette.dark)
            scene.add(part, head.place(_disc(tip, 0.165)), 0.1, palette.light)
            scene.add(part, head.place(_disc(tip, 0.085)), 0.1, palette.accent)
        else:
            scene.add(part, head.place(_rect(tip, 0.2, 0.2, lean)), 0.1, palette.light)
            scene.add(part, head.place(_rect(tip, 0.145, 0.145, lean)), 0.1, palette.dark)
        scene.mark(landmark, part, head.place(tip), 0.1)


def _add_pointed_ear(scene: _Scene, rng: np.random.Generator, palette: _Palette, head: _Head, flops: bool) -> None:
    root = _xy(-0.7, -0.62)
    swing = math.radians(rng.uniform(130, 170) if flops else rng.uniform(-72, -25))
    length = rng.uniform(0.75, 0.95) if flops else rng.uniform(0.75, 1.0)
    along = _xy(math.sin(swing), -math.cos(swing))
    across = _xy(-along[1], along[0])
    tip = root + length * along
    depth = np.array([0.15, 0.45, 0.15]) if flops else np.array([0.0, -0.1, 0.0])
    outline_32 = np.stack([root - 0.32 * across, tip, root + 0.32 * across])
    centre = outline_32.mean(axis=0)
    scene.add("pointed ear", head.place(outline_32), depth, palette.dark)
    scene.add("pointed ear", head.place(centre + (outline_32 - centre) * 0.72), depth, palette.limb)
    bead = tip - 0.1 * along  # a bead, so that the tip looks the same before any background
    scene.add("pointed ear", head.place(_disc(bead, 0.16)), float(depth[1]), palette.dark)
    scene.add("pointed ear", head.place(_disc(bead, 0.115)), float(depth[1]), palette.light)
    scene.mark(0, "pointed ear", head.place(bead), float(depth[1]))


def _add_round_ear(scene: _Scene, rng: np.random.Generator, palette: _Palette, head: _Head) -> None:
    swing = math.radians(rng.uniform(35, 68))
    centre = rng.uniform(1.08, 1.26) * _xy(math.sin(swing), -math.cos(swing))
    scene.add("round ear", head.place(_disc(centre, 0.36)), -0.1, palette.dark)
    scene.add("round ear", head.place(_disc(centre, 0.32)), -0.1, palette.limb)
    scene.add("round ear", head.place(_disc(centre, 0.15)), -0.1, palette.dark)
    scene.mark(1, "round ear", head.place(centre), -0.1)


def _add_body(scene: _Scene, rng: np.random.Generator, palette: _Palette) -> None:
    width, bottom = rng.uniform(0.6, 0.82), rng.uniform(1.85, 2.1)
    centre = _xy(0, (0.85 + bottom) / 2)
    height = bottom - centre[1]
    scene.add("body", _disc(centre, width, height, vertices=32), -0.05, palette.dark)
    scene.add("body", _disc(centre, width - 0.05, height - 0.05, vertices=32), 0.0, palette.body, textured=True)
    button = _xy(rng.uniform(-0.1, 0.1), bottom - rng.uniform(0.32, 0.42))
    scene.add("body", _disc(button, 0.2), 0.3, palette.light)
    scene.add("body", _rect(button, 0.15, 0.05), 0.3, palette.dark)
    scene.add("body", _rect(button, 0.05, 0.15), 0.3, palette.dark)
    scene.mark(13, "body", button, 0.3)
    knot = _xy(rng.uniform(-0.06, 0.06), rng.uniform(1.13, 1.2))
    wing = np.array([[0, 0], [0.36, -0.16], [0.36, 0.16]])
    for sign in (-1.0, 1.0):
        scene.add("body", knot + wing * _xy(sign, 1.0), 0.4, palette.light if sign > 0 else palette.accent)
    scene.add("body", _disc(knot, 0.16), 0.42, palette.dark)
    scene.add("body", _disc(knot, 0.105), 0.42, palette.light)
    scene.mark(12, "body", knot, 0.42)


def _pose_arm(rng: np.random.Generator, side: int, shoulder: Floats, layout: dict[int, Floats], head: _Head) -> Floats:
    """The arm's middle line, shoulder to hand: mostly out to its side, sometimes over the face or body."""
    sign = -1.0 if side == 0 else 1.0
    covers = rng.uniform() < 0.4
    target = _COVERABLE[int(rng.integers(len(_COVERABLE)))]
    swing, reach = math.radians(rng.uniform(25, 125)), rng.uniform(0.8, 1.25)
    jitter = rng.uniform(-0.2, 0.2, size=2)
    if covers:
        aim = {12: _xy(0, 1.15), 13: _xy(0, 1.6)}.get(target)
        hand = (head.place(layout[target]) if aim is None else aim) + jitter
    else:
        hand = shoulder + reach * _xy(sign * math.sin(swing), math.cos(swing))
    elbow = (shoulder + hand) / 2 + _xy(sign * rng.uniform(0.2, 0.75), rng.uniform(-0.1, 0.35))
    return _bezier(shoulder, elbow, hand)


def _add_arm(scene: _Scene, palette: _Palette, side: int, curve_N2: Floats, depth: float) -> None:
    part = ("left arm", "right arm")[side]
    hand = curve_N2[-1]
    along = curve_N2[-1] - curve_N2[-2]
    along = along / (np.linalg.norm(along) + 1e-9)
    depth_N = np.linspace(0.05, depth, len(curve_N2))
    depth_band = np.concatenate([depth_N, depth_N[::-1]])
    scene.add(part, _band(curve_N2, 0.125), depth_band, palette.dark)
    scene.add(part, _band(curve_N2, 0.085), depth_band, palette.limb)
    scene.add(part, _disc(hand, 0.27), depth, palette.dark)
    if side == 0:
        scene.add(part, _disc(hand, 0.23), depth, palette.limb)
        for angle in (0.0, 2 * math.pi / 3, 4 * math.pi / 3):
            pad = hand + 0.12 * along @ _rotation(angle).T
            scene.add(part, _disc(pad, 0.062, vertices=12), depth, palette.light)
    else:
        scene.add(part, _disc(hand, 0.23), depth, palette.light)
        across = _xy(-along[1], along[0])
        jaws = hand + 0.3 * along + np.array([[-0.17], [0.17]]) * across
        scene.add(part, np.stack([hand, *jaws]), depth, palette.dark)
    scene.mark(14 + side, part, hand, depth)


# --- camera ---------------------------------------------------------------------------------------


def _project(scene: _Scene, rng: np.random.Generator) -> tuple[list[Floats], Floats, tuple[float, float, float, float]]:
    """Brings outlines and landmarks into the unit square; also gives the box there."""
    order = sorted(scene.marks)
    marks_L2 = np.stack([scene.marks[i][0] for i in order])
    marks_depth_L = np.array([scene.marks[i][1] for i in order])
    flat_N2 = np.concatenate([shape.outline_N2 for shape in scene.shapes] + [marks_L2])
    depth_N = np.concatenate([shape.depth_N for shape in scene.shapes] + [marks_depth_L])
    seen_N2 = _look(_deform(flat_N2, rng), depth_N, rng)

    low, high = seen_N2.min(axis=0), seen_N2.max(axis=0)
    margin, side = rng.uniform(0.03, 0.09), rng.uniform(0.74, 0.98)
    corner = rng.uniform(0.0, 1.0 - side, size=2)
    scale = side / ((high - low).max() * (1 + 2 * margin))
    # The shorter axis has room to spare: the object may lie anywhere in it.
    slack = side - scale * (high - low)
    start = corner + slack * rng.uniform(0.25, 0.75, size=2)
    unit_N2 = (seen_N2 - low) * scale + start

    ends = np.cumsum([len(shape.outline_N2) for shape in scene.shapes])
    *outlines, points_L2 = np.split(unit_N2, ends)
    x0, y0 = (float(v) for v in corner)
    return outlines, points_L2, (x0, y0, x0 + side, y0 + side)


def _deform(points_N2: Floats, rng: np.random.Generator) -> Floats:
    """A smooth bend and stretch of the plane; gentle enough (slope < 0.2) never to fold."""
    phase, amount = rng.uniform(0, 2 * math.pi, size=2), rng.uniform(-0.1, 0.1, size=2)
    x_N, y_N = points_N2[:, 0], points_N2[:, 1]
    bent_x = x_N * rng.uniform(0.88, 1.12) + amount[0] * np.sin(1.4 * y_N + phase[0])
    bent_y = y_N + amount[1] * np.sin(1.4 * x_N + phase[1])
    return np.stack([bent_x, bent_y], axis=1)


def _look(points_N2: Floats, depth_N: Floats, rng: np.random.Generator) -> Floats:
    """Yaw, pitch, perspective, roll."""
    yaw, pitch = math.radians(rng.uniform(-24, 24)), math.radians(rng.uniform(-14, 14))
    roll, distance = math.radians(rng.uniform(-25, 25)), rng.uniform(5.0, 12.0)
    x_N, y_N = points_N2[:, 0], points_N2[:, 1] - 0.2
    turned_x = x_N * math.cos(yaw) + depth_N * math.sin(yaw)
    turned_z = depth_N * math.cos(yaw) - x_N * math.sin(yaw)
    turned_y = y_N * math.cos(pitch) - turned_z * math.sin(pitch)
    turned_z = y_N * math.sin(pitch) + turned_z * math.cos(pitch)
    seen_N2 = np.stack([turned_x, turned_y], axis=1) / (1.0 - turned_z / distance)[:, None]
    return seen_N2 @ _rotation(roll).T


def _find_visible(scene: _Scene, outlines: list[Floats], points_L2: Floats) -> NDArray[np.bool_]:
    """A landmark is hidden where a shape of another part, drawn later, lies over it."""
    contours = [(outline_N2 * 4096).astype(np.float32) for outline_N2 in outlines]
    visible = np.ones(len(points_L2), dtype=np.bool_)
    for landmark, (_, _, part, drawn) in scene.marks.items():
        x, y = (float(v) for v in points_L2[landmark] * 4096)
        for shape, contour in zip(scene.shapes[drawn:], contours[drawn:], strict=True):
            if shape.part != part and cv2.pointPolygonTest(contour, (x, y), False) >= 0:
                visible[landmark] = False
                break
    return visible


def _to_pixels(unit: Floats, size: int) -> Floats:
    return unit * size - 0.5


# --- picture --------------------------------------------------------------------------------------


def _vertices(outline_N2: Floats, size: int) -> NDArray[np.int32]:
    return np.rint(_to_pixels(outline_N2, size) * (1 << _SHIFT)).astype(np.int32)


def _fill(canvas: Image, outline_N2: Floats, colour: Colour | int) -> None:
    value = (colour,) * 3 if isinstance(colour, int) else colour
    cv2.fillPoly(canvas, [_vertices(outline_N2, canvas.shape[0])], value, lineType=cv2.LINE_AA, shift=_SHIFT)


def _paint_background(rng: np.random.Generator, size: int) -> Image:
    """Soft blotches, then shapes of the kinds the creature is made of, so that they attract keypoints too."""
    cells = int(rng.integers(3, 9))
    blotches = rng.integers(30, 226, size=(cells, cells, 3), dtype=np.uint8)
    mode = cv2.INTER_CUBIC if rng.uniform() < 0.7 else cv2.INTER_NEAREST
    canvas = np.ascontiguousarray(cv2.resize(blotches, (size, size), interpolation=mode), dtype=np.uint8)
    for _ in range(int(rng.integers(6, 19))):
        centre, radius = rng.uniform(0, 1, size=2), rng.uniform(0.02, 0.11)
        first, second = ((int(r), int(g), int(b)) for r, g, b in rng.integers(20, 236, size=(2, 3)))
        kind, angle = int(rng.integers(6)), rng.uniform(0, math.pi)
        _paint_clutter(canvas, kind, centre, radius, angle, first, second)
    return canvas


def _paint_clutter(
    canvas: Image, kind: int, centre: Floats, radius: float, angle: float, first: Colour, second: Colour
) -> None:
    if kind == 0:
        _fill(canvas, _disc(centre, radius), first)
        _fill(canvas, _disc(centre, radius * 0.5), second)
    elif kind == 1:
        _fill(canvas, _rect(centre, radius, radius * 0.6, angle), first)
    elif kind == 2:
        _fill(canvas, _rect(centre, radius, radius, angle), first)
        _fill(canvas, _rect(centre, radius * 0.6, radius * 0.6, angle), second)
    elif kind == 3:
        _fill(canvas, _disc(centre, radius * 1.2, vertices=3), first)
    elif kind == 4:
        _fill(canvas, _rect(centre, radius * 4, radius * 0.15, angle), first)
    else:
        _fill(canvas, _rect(centre, radius, radius * 0.25, angle), first)
        _fill(canvas, _rect(centre, radius * 0.25, radius, angle), first)


def _paint_shape(canvas: Image, shape: _Shape, outline_N2: Floats, rng: np.random.Generator) -> None:
    if not shape.textured:
        _fill(canvas, outline_N2, shape.colour)
        return
    size = canvas.shape[0]
    pixels_N2 = _to_pixels(outline_N2, size)
    x0, y0 = np.maximum(np.floor(pixels_N2.min(axis=0)).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(pixels_N2.max(axis=0)).astype(int) + 1, size)
    mask = np.zeros((size, size), dtype=np.uint8)
    cv2.fillPoly(mask, [_vertices(outline_N2, size)], (255,), shift=_SHIFT)
    region, inside = canvas[y0:y1, x0:x1], mask[y0:y1, x0:x1]
    skin_HW = _weave(rng, y1 - y0, x1 - x0)
    table = np.clip(np.arange(256)[:, None] / 200.0 * np.asarray(shape.colour), 0, 255).astype(np.uint8)
    skin = cv2.LUT(cv2.merge([skin_HW] * 3), table[None])
    cv2.copyTo(skin, inside, region)


def _weave(rng: np.random.Generator, height: int, width: int) -> Image:
    """A skin pattern (stripes, spots or blotches) over rounded shading; grey level 200 is the plain skin."""
    x_W = np.linspace(-1, 1, width, dtype=np.float32)
    y_H1 = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    kind, strength = int(rng.integers(3)), rng.uniform(0.0, 0.16)
    angle, frequency, phase = rng.uniform(0, math.pi), rng.uniform(6, 16), rng.uniform(0, 2 * math.pi)
    cells = rng.uniform(-1, 1, size=(7, 7)).astype(np.float32)
    along = math.cos(angle) * x_W + math.sin(angle) * y_H1
    if kind == 0:
        pattern = np.sin(frequency * along + phase)
    elif kind == 1:
        across = math.cos(angle) * y_H1 - math.sin(angle) * x_W
        pattern = np.sin(frequency * along + phase) * np.sin(frequency * across)
    else:
        pattern = cv2.resize(cells, (width, height), interpolation=cv2.INTER_CUBIC)
    shade = 1.0 - 0.22 * (np.square(x_W + 0.25) + np.square(y_H1 + 0.3))
    return np.asarray(np.clip(200 * shade * (1 + strength * pattern), 0, 255), dtype=np.uint8)


def _soften(canvas: Image, size: int, rng: np.random.Generator) -> Image:
    sigma = max(0.0, rng.uniform(-0.6, 0.9)) * size / 128 * _SUPERSAMPLE
    return canvas if sigma < 0.3 else np.asarray(cv2.GaussianBlur(canvas, (0, 0), sigma), dtype=np.uint8)


def _light(image: Image, paint_rng: np.random.Generator, grain_rng: np.random.Generator) -> Image:
    """Tone curve with a colour cast, light falling off across the image, grain."""
    size = image.shape[0]
    gamma, low, span = paint_rng.uniform(0.7, 1.45), paint_rng.uniform(0, 60), paint_rng.uniform(130, 195)
    cast = paint_rng.uniform(0.8, 1.2, size=3)
    level = (np.arange(256) / 255.0) ** gamma
    table = np.clip((low + span * level)[:, None] * cast, 0, 255).astype(np.uint8)
    angle, slope = paint_rng.uniform(0, 2 * math.pi), paint_rng.uniform(0, 0.5)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    fall_HW = 1.0 + slope * (math.cos(angle) * ramp[None] + math.sin(angle) * ramp[:, None])
    grain_HW = grain_rng.standard_normal((size, size), dtype=np.float32) * paint_rng.uniform(1, 7)
    lit = cv2.LUT(image, table[None]).astype(np.float32) * fall_HW[:, :, None] + grain_HW[:, :, None]
    return np.asarray(np.clip(np.rint(lit), 0, 255), dtype=np.uint8)
