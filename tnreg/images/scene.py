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
    """What one image shows, in units of the window.

    Attributes:
        bars: Tail and head (y, x) of every paddle, ``(n, 2, 2)``, the two paths first.
        discs: Centres of the discs, ``(2, 2)``.
        label: 1 if both are on one path.
        window: Side of the window.
    """

    bars: Array
    discs: Array
    label: int
    window: float

    @property
    def distance(self) -> float:
        """Distance between the discs as a share of the window's side."""
        return float(np.linalg.norm(self.discs[0] - self.discs[1])) / self.window


def window(size: int) -> float:
    """Side of the window in units: 300 from 150 pixels upwards, 162 for 32 pixels.

    Larger windows make small images unreadable; smaller ones leave no room for paths of nine paddles.
    """
    return 300.0 if size >= 150 else 300.0 * (size / 150) ** 0.4


def longest(size: int) -> int:
    """Most paddles of a path that still find room often enough: 17 from 150 pixels upwards, 9 for 32."""
    return int(window(size) / 1.6 / (_LENGTH + 2 * _MARGIN))


def scene(rng: np.random.Generator, length: int, size: int, *, matched: bool) -> Scene:
    """Draw paths, label, discs and distractors, with nothing but ``rng``.

    Args:
        rng: Source of all randomness.
        length: Paddles of each of the two paths.
        size: Pixels of the image that this is for; sets the window.
        matched: Negatives have the distances of positives.
    """
    side = window(size)
    label = int(rng.integers(2))
    start = int(rng.integers(2))
    paths = _pair(rng, length, side, matched)
    if matched and label == 0:
        wanted = _distances(paths[None])[0, start, start]
        paths, start = _pair_at(rng, length, side, float(wanted))
    end = start if label else 1 - start
    discs = np.stack([paths[start, 0, 0], paths[end, -1, 1]])
    bars = np.concatenate(
        [paths.reshape(-1, 2, 2), _distractors(rng, paths.reshape(-1, 2, 2), length, side)]
    )
    return Scene(bars, discs, label, side)


def draw(shown: Scene, size: int) -> Array:
    """The image, ``(size, size)`` uint8: white on black.

    Drawn with two samples a pixel and axis on 300 x 300 pixels (twice ``size``, where that is less) and
    brought to ``size`` by bilinear interpolation. Bars are 2 and discs 6 pixels thick before that.
    """
    raw = min(300, 2 * size)
    scale = raw / shown.window
    fine = np.zeros((2 * raw, 2 * raw), dtype=np.uint8)
    tail, head = shown.bars[:, 0] * scale, shown.bars[:, 1] * scale
    reach = int(np.ceil(_LENGTH * scale / 2 + _HALF_THICKNESS)) + 1
    along = (head - tail) / np.linalg.norm(head - tail, axis=1, keepdims=True)
    middle, half = (tail + head) / 2, _LENGTH * scale / 2

    pixels, y, x = _around(middle, reach)
    forward = y * along[:, 0, None, None] + x * along[:, 1, None, None]
    sideways = y * along[:, 1, None, None] - x * along[:, 0, None, None]
    _paint(fine, pixels, (np.abs(forward) <= half) & (np.abs(sideways) <= _HALF_THICKNESS))
    pixels, y, x = _around(shown.discs * scale, int(_RADIUS) + 1)
    _paint(fine, pixels, y**2 + x**2 <= _RADIUS**2)

    if raw == 2 * size:  # then bilinear interpolation is the mean of 2 x 2 pixels
        total = fine.reshape(size, 4, size, 4).sum((1, 3), dtype=np.uint16)
        return np.asarray(total * (255 / 16) + 0.5, dtype=np.uint8)
    white = fine.reshape(raw, 2, raw, 2).mean((1, 3), dtype=np.float32)
    weights = _bilinear(raw, size)
    out: Array = (255 * (weights @ white @ weights.T) + 0.5).astype(np.uint8)
    return out


def _pair(rng: np.random.Generator, length: int, side: float, nearest: bool) -> Array:
    """Tails and heads of two paths, ``(2, length, 2, 2)``."""
    while True:
        found = _pairs(rng, length, side, _PAIRS, nearest)
        if len(found):
            first: Array = found[0]
            return first


def _pair_at(
    rng: np.random.Generator, length: int, side: float, wanted: float
) -> tuple[Array, int]:
    """Two paths of which one starts ``wanted`` from where the other ends, and which one that is."""
    tolerance = _TOLERANCE * length
    while True:
        found = _pairs(rng, length, side, 8 * _PAIRS, True)
        across = _distances(found)[:, [0, 1], [1, 0]]
        near = np.argwhere(np.abs(across - wanted) <= tolerance)
        if len(near):
            one, start = near[rng.integers(len(near))]
            paths: Array = found[one]
            return paths, int(start)
        tolerance *= 1.1  # so that it ends, however unusual the distance


def _distances(paths: Array) -> Array:
    """From the start of path i to the end of path j, ``(pairs, i, j)``."""
    out: Array = np.linalg.norm(paths[:, :, None, 0, 0] - paths[:, None, :, -1, 1], axis=-1)
    return out


def _pairs(rng: np.random.Generator, length: int, side: float, tries: int, nearest: bool) -> Array:
    """The pairs that could be grown out of some tries, ``(pairs, 2, length, 2, 2)``."""
    border = _SEED_FRAME * side / 300
    first = rng.integers(np.ceil(border), np.floor(side - border) + 1, (tries, 2)).astype(float)
    around = np.deg2rad(rng.integers(0, 360, tries))
    second = np.rint(first + _SEEDS_APART * np.stack([np.sin(around), np.cos(around)], -1))
    angles = np.deg2rad(rng.integers(0, 360, (tries, 2)))
    bars, alive = _grow(rng, np.stack([first, second], 1), angles, length, side, None, nearest)
    return bars[alive]


def _distractors(rng: np.random.Generator, paths: Array, length: int, side: float) -> Array:
    """Tails and heads of all distractors, ``(n, 2, 2)``."""
    wanted = round(90 / length * (side / 300) ** 2)
    steps, frame = max(length // 3, 1), _FRAME * side / 300
    taken = _core(paths[:, 1], _angle(paths)).reshape(-1, 2)
    out: list[Array] = []
    for _ in range(_ROUNDS):
        missing = wanted - len(out)
        if not missing:
            break
        low, high = np.ceil(frame + _MARGIN), np.floor(side - frame - _MARGIN)
        tails = rng.integers(low, high + 1, (missing, _SEED_TRIES, 2)).astype(float)
        angles = np.deg2rad(rng.integers(0, 360, (missing, _SEED_TRIES)))
        core = _core(tails + _LENGTH * _direction(angles), angles)
        free = _nearest(core, taken).min(-1) >= _APART**2
        free &= _inside(core, side, frame + _MARGIN + _HALF_THICKNESS).all(-1)
        pick, rows = free.argmax(1), np.arange(missing)
        seeds = free.any(1)
        bars, alive = _grow(
            rng,
            tails[rows, pick][seeds, None],
            angles[rows, pick][seeds, None],
            steps,
            side,
            taken,
            True,
        )
        for contour in bars[alive][:, 0]:
            points = _core(contour[:, 1], _angle(contour)).reshape(-1, 2)
            if _nearest(points, taken).min() >= _APART**2:
                out.append(contour)
                taken = np.concatenate([taken, points])
    return np.concatenate(out) if out else np.empty((0, 2, 2))


def _grow(
    rng: np.random.Generator,
    tails: Array,
    angles: Array,
    steps: int,
    side: float,
    taken: Array | None,
    nearest: bool,
) -> tuple[Array, Array]:
    """Grow paths from their first paddles, those of one row in turn and clear of each other.

    Args:
        rng: Source of randomness.
        tails: Where the first paddles start, ``(rows, paths, 2)``.
        angles: Where they point, ``(rows, paths)``.
        steps: Paddles of a path.
        side: Side of the window.
        taken: Points of other bars, ``(points, 2)``, for all rows.
        nearest: Round pixels to the nearest one, not pivots up and heads down.

    Returns:
        Tails and heads, ``(rows, paths, steps, 2, 2)``, and which rows could be grown.
    """
    rows, paths = angles.shape
    frame = _FRAME * side / 300
    bars = np.zeros((rows, paths, steps, 2, 2))
    points = np.full((rows, paths, steps, len(_CORE), 2), _FAR)
    heading = angles.copy()
    bars[:, :, 0, 0] = tails
    bars[:, :, 0, 1] = tails + _LENGTH * _direction(angles)
    points[:, :, 0] = _core(bars[:, :, 0, 1], angles)
    inner = frame + _MARGIN + _HALF_THICKNESS
    alive: Array = np.all(_inside(points[:, :, 0], side, inner), (1, 2))
    offsets, around = _circle(nearest)
    pivots = bars[:, :, 0, 1] - (_LENGTH + _MARGIN) * _direction(angles)
    each = np.arange(rows)
    for step in range(1, steps):
        for path in range(paths):
            now = heading[:, path]
            if nearest:
                pivot = np.rint(bars[:, path, step - 1, 1] + _MARGIN * _direction(now))
            else:
                pivot = np.ceil(pivots[:, path] + (_LENGTH + 2 * _MARGIN) * _direction(now))
            pivots[:, path] = pivot
            # heads on the circle that need no turn over 50 degrees
            start = np.searchsorted(around, np.mod(now - np.pi / 2 / _CONTINUITY, 2 * np.pi))
            some = (start[:, None] + np.arange(_few(len(around)))) % len(around)
            turn = np.abs(np.mod(around[some] - now[:, None] + np.pi, 2 * np.pi) - np.pi)
            weight = np.cos(np.minimum(_CONTINUITY * turn, np.pi / 2)) ** 2
            heads = pivot[:, None] + offsets[some]
            own = points[:, path, step - 1].copy()
            points[:, path, step - 1] = _FAR  # the paddle before may be close
            others = points.reshape(rows, -1, 2)
            near = _nearest(heads, others)
            if taken is not None:
                near = np.minimum(near, _nearest(heads, taken))
            weight *= (near >= _CLEAR**2) & _inside(heads, side, frame + _MARGIN)
            sums = weight.cumsum(1)
            alive &= sums[:, -1] > 1e-4
            u = rng.random((rows, _DRAWS)) * sums[:, -1:]
            drawn = np.minimum((sums[:, None] <= u[:, :, None]).sum(-1), some.shape[1] - 1)
            drawn_heads = heads[each[:, None], drawn]
            drawn_angles = around[some[each[:, None], drawn]]
            core = _core(drawn_heads, drawn_angles)
            near = _nearest(core.reshape(rows, -1, 2), others)
            if taken is not None:
                near = np.minimum(near, _nearest(core.reshape(rows, -1, 2), taken))
            fits = near.reshape(rows, _DRAWS, -1).min(-1) >= _APART**2
            fits &= _inside(core, side, inner).all(-1)
            alive &= fits.any(1)
            pick = fits.argmax(1)
            points[:, path, step - 1] = own
            heading[:, path] = drawn_angles[each, pick]
            head = drawn_heads[each, pick]
            bars[:, path, step, 0] = head - _LENGTH * _direction(heading[:, path])
            bars[:, path, step, 1] = head
            points[:, path, step] = core[each, pick]
    return bars, alive


@functools.cache
def _circle(nearest: bool) -> tuple[Array, Array]:
    """Pixels on the circle of radius 8 and their angles, ascending from 0 to 2π."""
    radius = _LENGTH + _MARGIN
    turn = np.arange(0, 2 * np.pi, 1 / radius)
    circle = radius * np.stack([np.sin(turn), np.cos(turn)], -1)
    pixels = np.unique(np.rint(circle) if nearest else np.floor(circle), axis=0)
    angles = np.mod(np.arctan2(pixels[:, 0], pixels[:, 1]), 2 * np.pi)
    order = angles.argsort()
    return pixels[order], angles[order]


def _few(pixels: int) -> int:
    """How many neighbouring pixels of the circle cover all turns that have a probability."""
    return int(np.ceil(pixels / 2 / _CONTINUITY)) + 2


def _direction(angle: Array) -> Array:
    return np.stack([np.sin(angle), np.cos(angle)], -1)


def _angle(bars: Array) -> Array:
    way = bars[..., 1, :] - bars[..., 0, :]
    angle: Array = np.arctan2(way[..., 0], way[..., 1])
    return angle


def _core(heads: Array, angles: Array) -> Array:
    """Points along the middle line of bars, ``(..., 3, 2)``."""
    out: Array = heads[..., None, :] - _CORE[:, None] * _direction(angles)[..., None, :]
    return out


def _inside(points: Array, side: float, border: float) -> Array:
    out: Array = np.all((points >= border) & (points <= side - border), -1)
    return out


def _nearest(points: Array, others: Array) -> Array:
    """Squared distance to the nearest of the others: ``(..., n, 2), (..., m, 2) -> (..., n)``."""
    y = points[..., :, None, 0] - others[..., None, :, 0]
    x = points[..., :, None, 1] - others[..., None, :, 1]
    out: Array = (y * y + x * x).min(-1)
    return out


def _around(centres: Array, reach: int) -> tuple[tuple[Array, Array], Array, Array]:
    """Half pixels near each centre, and their places seen from it, in pixels."""
    window = np.arange(-2 * reach, 2 * reach)
    corner = np.floor(2 * centres).astype(np.int64)
    rows, columns = (corner[:, axis, None] + window for axis in (0, 1))
    y = (rows + 0.5) / 2 - centres[:, 0, None]
    x = (columns + 0.5) / 2 - centres[:, 1, None]
    return (rows, columns), y[:, :, None], x[:, None, :]


def _paint(fine: Array, pixels: tuple[Array, Array], on: Array) -> None:
    shape, row, column = np.nonzero(on)
    y, x = pixels[0][shape, row], pixels[1][shape, column]
    kept = (y >= 0) & (x >= 0) & (y < len(fine)) & (x < len(fine))
    fine[y[kept], x[kept]] = 1


@functools.cache
def _bilinear(old: int, new: int) -> Array:
    """Matrix of bilinear interpolation between centres of pixels, ``(new, old)``."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(at.astype(int), old - 2)
    weights = np.zeros((new, old), dtype=np.float32)
    weights[np.arange(new), low] = 1 - (at - low)
    weights[np.arange(new), low + 1] = at - low
    return weights
