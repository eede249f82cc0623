"""One Pathfinder image: two dashed paths among distractors, and two discs to be told apart.

The geometry is that of Linsley et al. (2018), arXiv:1805.08315, as Razin, Maman and Cohen (2022),
arXiv:2201.11729, used it. On a window of 300 x 300 units two paths of ``length`` paddles (bars 5 long,
2 thick) start 27 apart and grow in turn. The pivot of a new paddle lies 3 ahead of the last head, its
own head 8 from the pivot; a turn by t has a probability proportional to cos²(min(1.8 t, π/2)), so turns
stay under 50 degrees. Bars keep 6 from each other and 25 from the border. Distractors are some
90 / ``length`` paths of ``length // 3`` paddles. Label 1: the discs mark both ends of one path; label 0:
the start of one and the end of the other.

Where this differs from the published images:

* the two newest paddles may not cross, and distractors stay off all four ends of the paths;
* ``matched``: in the published images the distance between the discs alone tells the label in 77 to
  94 % of all cases. Here a negative takes its distance from a positive that is drawn first and thrown
  away, and paths are drawn until a start and an end of different paths are that far apart. Pixels are
  rounded to the nearest; as published, rounding up and down in turn, paths that grow to the lower
  right come out longer.

Sizes below 150 keep these lengths on a smaller window (``window``), since a path of 300 units drawn on
32 pixels is no longer visible. Free space is tested on three points along the middle of every bar, which
is exact to 0.1 units and needs no dilated masks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

_LENGTH, _HALF_THICKNESS, _MARGIN, _RADIUS = 5.0, 1.0, 3.0, 3.0
_SEEDS_APART, _FRAME, _SEED_FRAME = 27.0, 22.0, 54.0
_CONTINUITY = 1.8
_APART = 2 * _MARGIN + 2 * _HALF_THICKNESS  # between the middle lines of two bars
_CLEAR = 2 * _MARGIN + _HALF_THICKNESS  # from a candidate for a head to a middle line
_CORE = np.array([1.0, 2.5, 4.0])  # a bar's points, behind its head; its ends are flat
_FAR = 1e6  # where paddles are that do not exist yet
_DRAWS, _ROUNDS, _SEED_TRIES, _PAIRS = 3, 6, 16, 8
_TOLERANCE = 0.1  # how closely a negative meets its distance, by paddle: short paths vary less


@dataclass(frozen=True)
class Scene:
    """What one image shows, in units of the window."""

    bars: Array  # tail and head (y, x) of every paddle, (n, 2, 2), the two paths first
    discs: Array  # their centres, (2, 2)
    label: int  # 1 if both discs are on one path
    window: float  # its side

    @property
    def distance(self) -> float:
        """Distance between the discs as a share of the window's side."""
        return float(np.linalg.norm(self.discs[0] - self.discs[1])) / self.window


def window(size: int) -> float:
    """Return the side of the window in units: 300 from 150 pixels upwards, 162 for 32 pixels.

    Larger windows make small images unreadable; smaller ones leave no room for paths of nine paddles.
    """
    return 300.0 if size >= 150 else 300.0 * (size / 150) ** 0.4


def longest(size: int) -> int:
    """Return how many paddles still find room often enough: 17 from 150 pixels upwards, 9 for 32."""
    return int(window(size) / 1.6 / (_LENGTH + 2 * _MARGIN))


def sample_scene(rng: np.random.Generator, length: int, size: int, *, matched: bool) -> Scene:
    """Draw paths of ``length`` paddles, label, discs and distractors for an image of ``size`` pixels.

    If ``matched``, negatives have the distances of positives.
    """
    side = window(size)
    label, start = int(rng.integers(2)), int(rng.integers(2))
    while not len(pairs := _pairs(rng, length, side, matched)):
        pass
    paths = pairs[0]
    if matched and label == 0:
        distance = float(_distances(pairs)[0, start, start])
        paths, start = _pair_at(rng, length, side, distance)
    discs = np.stack([paths[start, 0, 0], paths[start if label else 1 - start, -1, 1]])
    bars = paths.reshape(-1, 2, 2)
    bars = np.concatenate([bars, _distractors(rng, bars, length, side)])
    return Scene(bars, discs, label, side)


def render(scene: Scene, size: int) -> Array:
    """Return the image of a scene, ``(size, size)`` uint8: white on black.

    It is made of two samples a pixel and axis on 300 x 300 pixels (twice ``size``, where that is less)
    and brought to ``size`` by bilinear interpolation. Bars are 2 and discs 6 pixels thick before that.
    """
    raw = min(300, 2 * size)
    scale = raw / scene.window
    samples = np.zeros((2 * raw, 2 * raw), dtype=np.uint8)
    tail, head = scene.bars[:, 0] * scale, scene.bars[:, 1] * scale
    along = (head - tail) / np.linalg.norm(head - tail, axis=1, keepdims=True)
    half = _LENGTH * scale / 2
    pixels, y, x = _around((tail + head) / 2, int(np.ceil(half + _HALF_THICKNESS)) + 1)
    forward = y * along[:, 0, None, None] + x * along[:, 1, None, None]
    sideways = y * along[:, 1, None, None] - x * along[:, 0, None, None]
    _paint(samples, pixels, (np.abs(forward) <= half) & (np.abs(sideways) <= _HALF_THICKNESS))
    pixels, y, x = _around(scene.discs * scale, int(_RADIUS) + 1)
    _paint(samples, pixels, y**2 + x**2 <= _RADIUS**2)

    if raw == 2 * size:  # then bilinear interpolation is the mean of 2 x 2 pixels
        total = samples.reshape(size, 4, size, 4).sum((1, 3), dtype=np.uint16)
        return np.asarray(total * (255 / 16) + 0.5, dtype=np.uint8)
    white = samples.reshape(raw, 2, raw, 2).mean((1, 3), dtype=np.float32)
    weights = _bilinear(raw, size)
    return np.asarray(255 * (weights @ white @ weights.T) + 0.5).astype(np.uint8)


def _pair_at(rng: np.random.Generator, length: int, side: float, distance: float) -> tuple[Array, int]:
    """Return two paths, and which of them starts at this distance from the end of the other."""
    tolerance, near = _TOLERANCE * length, np.empty((0, 2), dtype=int)
    while not len(near):
        pairs = _pairs(rng, length, side, True, 8 * _PAIRS)
        across = _distances(pairs)[:, [0, 1], [1, 0]]
        near = np.argwhere(np.abs(across - distance) <= tolerance)
        tolerance *= 1.1  # so that it ends, however unusual the distance
    pair, start = near[rng.integers(len(near))]
    return pairs[pair], int(start)


def _distances(pairs: Array) -> Array:
    """Return the distances from the start of path i to the end of path j, ``(pairs, i, j)``."""
    return np.asarray(np.linalg.norm(pairs[:, :, None, 0, 0] - pairs[:, None, :, -1, 1], axis=-1))


def _pairs(rng: np.random.Generator, length: int, side: float, nearest: bool, tries: int = _PAIRS) -> Array:
    """Return the pairs of paths that could be grown out of some tries, ``(pairs, 2, length, 2, 2)``."""
    border = _SEED_FRAME * side / 300
    first = rng.integers(np.ceil(border), np.floor(side - border) + 1, (tries, 2)).astype(float)
    around = np.deg2rad(rng.integers(0, 360, tries))
    second = np.rint(first + _SEEDS_APART * _direction(around))
    angles = np.deg2rad(rng.integers(0, 360, (tries, 2)))
    return _grow(rng, np.stack([first, second], 1), angles, length, side, np.empty((0, 2)), nearest)


def _distractors(rng: np.random.Generator, paths: Array, length: int, side: float) -> Array:
    """Return tails and heads of all distractors, ``(n, 2, 2)``."""
    count = round(90 / length * (side / 300) ** 2)
    steps, frame = max(length // 3, 1), _FRAME * side / 300
    occupied = _points_of(paths)
    distractors: list[Array] = []
    for _ in range(_ROUNDS):
        if not (missing := count - len(distractors)):
            break
        low, high = np.ceil(frame + _MARGIN), np.floor(side - frame - _MARGIN)
        tails = rng.integers(low, high + 1, (missing, _SEED_TRIES, 2)).astype(float)
        angles = np.deg2rad(rng.integers(0, 360, (missing, _SEED_TRIES)))
        core = _core(tails + _LENGTH * _direction(angles), angles)
        free = (_nearest(core, occupied).min(-1) >= _APART**2) & _is_inside(core, side).all(-1)
        seeds = np.flatnonzero(free.any(1))
        if not len(seeds):
            continue
        first = seeds[:, None], free.argmax(1)[seeds, None]  # the first free one of its tries
        for distractor in _grow(rng, tails[first], angles[first], steps, side, occupied, True)[:, 0]:
            points = _points_of(distractor)
            if _nearest(points, occupied).min() >= _APART**2:
                distractors.append(distractor)
                occupied = np.concatenate([occupied, points])
    return np.concatenate(distractors) if distractors else np.empty((0, 2, 2))


def _grow(
    rng: np.random.Generator,
    tails: Array,
    angles: Array,
    steps: int,
    side: float,
    occupied: Array,
    nearest: bool,
) -> Array:
    """Grow paths from their first paddles, those of one row in turn and clear of each other.

    First paddles start at ``tails``, ``(rows, paths, 2)``, and point to ``angles``, ``(rows, paths)``.
    ``occupied`` holds points of other bars, ``(points, 2)``, for all rows. Pixels are rounded to the
    ``nearest`` one, else pivots up and heads down. Returns tails and heads,
    ``(rows, paths, steps, 2, 2)``, of the rows that could be grown.
    """
    rows, paths = angles.shape
    bars = np.zeros((rows, paths, steps, 2, 2))
    points = np.full((rows, paths, steps, len(_CORE), 2), _FAR)
    heading = angles.copy()
    bars[:, :, 0] = np.stack([tails, tails + _LENGTH * _direction(angles)], 2)
    points[:, :, 0] = _core(bars[:, :, 0, 1], angles)
    alive: Array = np.all(_is_inside(points[:, :, 0], side), (1, 2))
    offsets, around = _circle(nearest)
    few = int(np.ceil(len(around) / 2 / _CONTINUITY)) + 2  # pixels that cover all turns
    pivots = bars[:, :, 0, 1] - (_LENGTH + _MARGIN) * _direction(angles)
    each = np.arange(rows)
    for step in range(1, steps):
        for path in range(paths):
            angle = heading[:, path]
            if nearest:
                pivot = np.rint(bars[:, path, step - 1, 1] + _MARGIN * _direction(angle))
            else:
                pivot = np.ceil(pivots[:, path] + (_LENGTH + 2 * _MARGIN) * _direction(angle))
            pivots[:, path] = pivot
            others = points.copy()
            others[:, path, step - 1] = _FAR  # the paddle before may be close
            others = others.reshape(rows, -1, 2)

            # heads on the circle that need no turn over 50 degrees, and their probabilities
            start = np.searchsorted(around, np.mod(angle - np.pi / 2 / _CONTINUITY, 2 * np.pi))
            pixels = (start[:, None] + np.arange(few)) % len(around)
            turn = np.abs(np.mod(around[pixels] - angle[:, None] + np.pi, 2 * np.pi) - np.pi)
            weight = np.cos(np.minimum(_CONTINUITY * turn, np.pi / 2)) ** 2
            heads = pivot[:, None] + offsets[pixels]
            weight *= _nearest(heads, others, occupied) >= _CLEAR**2
            sums = (weight * _is_inside(heads, side, 0.0)).cumsum(1)
            alive &= sums[:, -1] > 1e-4

            # the first of some draws whose bar is clear of all others
            u = rng.random((rows, _DRAWS)) * sums[:, -1:]
            draws = np.minimum((sums[:, None] <= u[:, :, None]).sum(-1), few - 1)
            drawn_heads = heads[each[:, None], draws]
            drawn_angles = around[pixels[each[:, None], draws]]
            core = _core(drawn_heads, drawn_angles)
            near = _nearest(core.reshape(rows, -1, 2), others, occupied)
            fits = near.reshape(rows, _DRAWS, -1).min(-1) >= _APART**2
            fits &= _is_inside(core, side).all(-1)
            alive &= fits.any(1)
            pick = fits.argmax(1)
            heading[:, path], head = drawn_angles[each, pick], drawn_heads[each, pick]
            tail = head - _LENGTH * _direction(heading[:, path])
            bars[:, path, step] = np.stack([tail, head], 1)
            points[:, path, step] = core[each, pick]
    return bars[alive]


@functools.cache
def _circle(nearest: bool) -> tuple[Array, Array]:
    """Return the pixels on the circle of radius 8 and their angles, ascending from 0 to 2π."""
    radius = _LENGTH + _MARGIN
    circle = radius * _direction(np.arange(0, 2 * np.pi, 1 / radius))
    pixels = np.unique(np.rint(circle) if nearest else np.floor(circle), axis=0)
    angles = np.mod(np.arctan2(pixels[:, 0], pixels[:, 1]), 2 * np.pi)
    order = angles.argsort()
    return pixels[order], angles[order]


def _direction(angle: Array) -> Array:
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def _points_of(bars: Array) -> Array:
    """Return the points along the middle lines of bars, ``(points, 2)``."""
    y, x = np.moveaxis(bars[:, 1] - bars[:, 0], -1, 0)
    return _core(bars[:, 1], np.arctan2(y, x)).reshape(-1, 2)


def _core(heads: Array, angles: Array) -> Array:
    """Return points along the middle line of bars, ``(..., 3, 2)``."""
    return np.asarray(heads[..., None, :] - _CORE[:, None] * _direction(angles)[..., None, :])


def _is_inside(points: Array, side: float, half_thickness: float = _HALF_THICKNESS) -> Array:
    """Tell which points, with what is around them, are clear of the frame."""
    border = _FRAME * side / 300 + _MARGIN + half_thickness
    return np.asarray(np.all((points >= border) & (points <= side - border), -1))


def _nearest(points: Array, *obstacles: Array) -> Array:
    """Return squared distances to the nearest obstacle: ``(..., n, 2), (..., m, 2).. -> (..., n)``."""
    squares = []
    for others in obstacles:
        y = points[..., :, None, 0] - others[..., None, :, 0]
        x = points[..., :, None, 1] - others[..., None, :, 1]
        squares.append((y * y + x * x).min(-1, initial=np.inf))
    return np.asarray(np.minimum.reduce(squares))


def _around(centres: Array, reach: int) -> tuple[tuple[Array, Array], Array, Array]:
    """Return the half pixels near each centre, and their offsets from it, in pixels."""
    window = np.arange(-2 * reach, 2 * reach)
    corner = np.floor(2 * centres).astype(np.int64)
    rows, columns = (corner[:, axis, None] + window for axis in (0, 1))
    y = (rows + 0.5) / 2 - centres[:, 0, None]
    x = (columns + 0.5) / 2 - centres[:, 1, None]
    return (rows, columns), y[:, :, None], x[:, None, :]


def _paint(samples: Array, pixels: tuple[Array, Array], mask: Array) -> None:
    """Set the samples under a mask to white; what is beyond the image is cut off."""
    shape, row, column = np.nonzero(mask)
    y, x = pixels[0][shape, row], pixels[1][shape, column]
    visible = (y >= 0) & (x >= 0) & (y < len(samples)) & (x < len(samples))
    samples[y[visible], x[visible]] = 1


@functools.cache
def _bilinear(old: int, new: int) -> Array:
    """Return the matrix of bilinear interpolation between centres of pixels, ``(new, old)``."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    columns = [np.interp(at, np.arange(old), pixel) for pixel in np.eye(old)]
    return np.stack(columns, 1).astype(np.float32)
