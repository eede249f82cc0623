"""Image sets: the same from any number of workers, matched in distance, read without running code."""

import dataclasses
import functools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from refusals import Bomb, refuses

from tnreg import DataError, FileError, OptionError, ShapeError, images
from tnreg.experiments import locality
from tnreg.experiments.locality.settings import Settings, penalty_of
from tnreg.images.scene import longest, render, sample_scene, window


def scenes(length, size, matched, count=60):
    rngs = (np.random.default_rng([5, i]) for i in range(count))
    return [sample_scene(rng, length, size, matched=matched) for rng in rngs]


@pytest.mark.slow
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize(("length", "size"), [(3, 150), (9, 150), (5, 32), (9, 32)])
def test_geometry(length, size, matched):
    """Lengths, turns, free space and discs of the published images, with nothing crossing."""
    for shown in scenes(length, size, matched, 12):
        side = window(size)
        assert shown.window == side and shown.bars.shape[1:] == (2, 2)
        way = shown.bars[:, 1] - shown.bars[:, 0]
        assert np.allclose(np.linalg.norm(way, axis=1), 5)
        # points along the middle lines, without their flat ends
        lines = shown.bars[:, None, 0] + np.linspace(0.2, 0.8, 21)[:, None] * way[:, None]
        frame = 22 * side / 300
        assert (lines >= frame + 4 - 1e-9).all() and (lines <= side - frame - 4 + 1e-9).all()

        gaps = np.linalg.norm(lines[:, None, :, None] - lines[None, :, None], axis=-1).min((2, 3))
        first, few = 2 * length, length // 3
        # the paddle before may be close, every other one keeps its distance
        followers = [at for at in range(first - 1) if at != length - 1]
        followers += [at for at in range(first, len(gaps) - 1) if (at - first) % few < few - 1]
        for at in followers:
            assert 5 < gaps[at, at + 1] < 12
            gaps[at, at + 1] = gaps[at + 1, at] = 99
        np.fill_diagonal(gaps, 99)
        assert gaps.min() > 7.9

        two = shown.bars[:first].reshape(2, length, 2, 2)
        assert abs(np.linalg.norm(two[0, 0, 0] - two[1, 0, 0]) - 27) < 1
        angle = np.arctan2(*np.moveaxis(two[:, :, 1] - two[:, :, 0], -1, 0))
        turn = np.abs((np.diff(angle, axis=1) + np.pi) % (2 * np.pi) - np.pi)
        assert turn.max() < np.deg2rad(50.01)
        starts, ends = two[:, 0, 0], two[:, -1, 1]
        one = [i for i in range(2) if np.array_equal(starts[i], shown.discs[0])]
        other = [i for i in range(2) if np.array_equal(ends[i], shown.discs[1])]
        assert len(one) == len(other) == 1 and (one == other) == (shown.label == 1)
        distractors = lines[first:].reshape(-1, 2)
        if len(distractors):
            off = np.linalg.norm(distractors[:, None] - shown.discs, axis=-1)
            assert off.min() > 3 + 1  # radius of a disc and half a bar


@pytest.mark.parametrize("length", [3, 5, 7, 9])
def test_distractors(length):
    found, most = scenes(length, 150, False, 10), round(90 / length) * (length // 3)
    counts = [len(shown.bars) - 2 * length for shown in found]
    assert max(counts) <= most and np.mean(counts) > 0.9 * most


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, 7])
def test_distances_match_in_both_classes(length):
    """The two means differ by a small share of what they differ by in the published images."""
    ratios = {}
    for matched in (False, True):
        shown = scenes(length, 150, matched, 110)
        both = [[s.distance * 300 for s in shown if s.label == k] for k in (0, 1)]
        gap, ratios[matched] = (abs(np.subtract(*map(np.median, both))), np.divide(*map(np.std, both)))
    assert gap < 1.5 and ratios[False] > 3 and 0.6 < ratios[True] < 1.7


def test_distance_only_accuracy():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 2000)
    noise = rng.normal(size=2000)
    assert abs(images.distance_only_accuracy(noise, labels) - 0.5) < 0.05
    assert images.distance_only_accuracy(noise + 10 * labels, labels) == 1
    # one label in the middle, the other on both sides: no threshold tells them, neighbours do
    assert images.distance_only_accuracy(np.where(labels, noise, 9 * np.sign(noise)), labels) > 0.98
    assert images.distance_only_accuracy(noise[:60], labels[:60]) is None
    with pytest.raises(DataError, match="3 distances, but 2 labels"):
        images.distance_only_accuracy(noise[:3], labels[:2])


def test_votes_of_neighbours_are_those_of_all_pairs():
    rng, right = np.random.default_rng(1), 0
    labels, values = rng.integers(0, 2, 90), rng.random(90)
    for i in range(90):
        others = np.flatnonzero(np.arange(90) % 5 != i % 5)
        near = others[np.argsort(np.abs(values[others] - values[i]))[:7]]
        right += (labels[near].mean() > 0.5) == labels[i]
    assert images.distance_only_accuracy(values, labels, neighbours=7) == right / 90


@pytest.mark.parametrize("size", [32, 100, 150, 233, 300])
def test_drawing(size):
    assert longest(150) == 17 and longest(32) == 9
    shown = sample_scene(np.random.default_rng(3), 5, size, matched=True)
    image = render(shown, size)
    assert image.shape == (size, size) and image.dtype == np.uint8
    for y, x in shown.discs / shown.window * size:
        assert image[int(y), int(x)] > 200
    border = int(20 / 300 * size)
    assert image[:border].max() == image[:, -border:].max() == 0
    # as much white as the shapes have: 4.6 units of area or more are lost to no rounding
    scale = min(300, 2 * size) / shown.window
    bars, discs = len(shown.bars) * 5 * scale * 2, 2 * np.pi * 9
    white = image.sum() / 255 * (min(300, 2 * size) / size) ** 2
    assert 0.85 * (bars + discs) - 60 < white < 1.05 * (bars + discs)


def test_pathfinder_set(tmp_path):
    draw = functools.partial(images.pathfinder, length=3, size=32, matched=True)
    first, again = draw(75, seed=4, workers=1), draw(75, seed=4, workers=3, progress=True)
    for name in ("images", "labels", "distances"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.images.shape == (75, 1, 32, 32) and set(first.labels) == {0, 1}
    fewer = draw(7, seed=4)
    assert np.array_equal(first.images[:7], fewer.images)
    for more in (draw(7, seed=4, split="test"), draw(7, seed=5)):
        assert not any(np.array_equal(a, b) for a in first.images for b in more.images)
    assert 0 < first.config["distance-only accuracy"] < 1
    assert fewer.config["distance-only accuracy"] is None
    assert "pathfinder: 75 images 1x32x32" in repr(first) and "distance-only" in repr(first)

    found = images.load(first.save(tmp_path / "set.npz"))
    assert np.array_equal(found.images, first.images) and found.config == first.config
    assert found.boxes == () and found.images.dtype == np.uint8 and len(found) == 75
    with np.load(tmp_path / "set.npz", allow_pickle=False) as file:
        assert json.loads(str(file["about"]))["config"]["matched"] is True
    assert first.sheet(tmp_path / "sheet.png").stat().st_size > 1000
    with pytest.raises(OptionError, match="this set has no boxes"):
        _ = first.control_boxes


@pytest.fixture(scope="module")
def digits():
    return images.is_same_class(600, distance=24, seed=3)


def test_pairs_of_digits(digits, tmp_path):
    assert digits.images.shape == (600, 1, 8, 40) and digits.images.dtype == np.float32
    assert digits.boxes == ((0, 0, 8, 8), (0, 32, 8, 40)) and digits.labels.sum() == 300
    assert np.all(digits.images[..., 8:32] == 0)
    again, near, clean = (
        images.is_same_class(600, distance=distance, seed=3, **options)
        for distance, options in ((24, {}), (0, {}), (24, {"noise": 0}))
    )
    assert np.array_equal(again.images, digits.images)
    # the same pairs and the same noise, somewhere else
    assert near.boxes == ((0, 12, 8, 20), (0, 20, 8, 28))
    assert np.array_equal(near.images[..., 12:20], digits.images[..., :8])
    noise = (digits.images - clean.images)[..., :8]
    assert abs(noise.std() - 0.2) < 0.01 and abs(noise.mean()) < 0.01
    assert images.load(digits.save(tmp_path / "d.npz")).boxes == digits.boxes
    assert digits.sheet(tmp_path / "d.png", rows=2, columns=3).exists()


def test_pairs_are_of_the_classes_that_the_labels_say():
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    small = (values / 16 - 0.3).astype(np.float32)
    known = {v.tobytes(): (c, i) for i, (v, c) in enumerate(zip(small, classes, strict=True))}
    used = {}
    for split in ("train", "test"):
        found = images.is_same_class(400, distance=8, split=split, seed=1, noise=0)
        left, right = ([known[x.tobytes()] for x in found.images[:, 0, :, a:c]] for _, a, _, c in found.boxes)
        same = [a[0] == b[0] for a, b in zip(left, right, strict=True)]
        assert same == found.labels.astype(bool).tolist()
        assert all(a[1] != b[1] for a, b in zip(left, right, strict=True))
        used[split] = {i for _, i in left + right}
    assert not used["train"] & used["test"]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["photos", "spectra"])
def test_pairs_from_files_inside_packages(source):
    draw = functools.partial(images.is_same_class, 200, source=source, noise=0)
    shown = {split: draw(distance=24, split=split, seed=2) for split in ("train", "test")}
    used = {}
    for split, found in shown.items():
        assert found.images.shape == (200, 1, 8, 40) and found.labels.sum() == 100
        assert found.images.dtype == np.float32 and np.isfinite(found.images).all()
        left, right = (found.images[..., box[1] : box[3]] for box in found.boxes)
        alike = (left == right).all((1, 2, 3))
        if source == "photos":
            assert np.array_equal(alike, found.labels == 1)
            assert np.allclose(left.mean((1, 2, 3)), 0, atol=1e-6) and np.allclose(left.std((1, 2, 3)), 0.35)
        else:
            assert not alike.any()
        used[split] = {x.tobytes() for x in (*left, *right)}
    assert not used["train"] & used["test"]
    again, other = draw(distance=0, seed=2), draw(distance=0, seed=3)
    assert np.array_equal(again.images[..., 12:20], shown["train"].images[..., :8])
    assert not np.array_equal(other.images, again.images)
    assert images.is_same_class(2, source=source, distance=0).config["noise"] == (source == "photos") * 0.3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photos", "spectra"])
def test_presets_train_on_them(name, tmp_path):
    few = {"train": 64, "test": 30, "epochs": 1, "distances": (24,), "seeds": (1,), "arms": ("plain", "igc")}
    rows = locality.run(dataclasses.replace(locality.SETS[name], **few), tmp_path / "sweep")
    assert [row["arm"] for row in rows] == ["plain", "igc"] and rows[0]["penalty"] == 0 < rows[1]["penalty"]


def test_patches_as_far_apart_as_the_discs():
    paths, settings = (
        images.pathfinder(30, length=5, size=40, seed=1),
        Settings(patches="discs", patch_size=6),
    )
    sampler = penalty_of(settings, "igc", 3, paths).patches
    assert sampler.distance == round(np.median(paths.distances)) - 6 > 0
    shown = torch.from_numpy(paths.images).float()
    for box, other in (sampler.draw(shown).tolist() for _ in range(5)):
        assert max(abs(a - b) for a, b in zip(box[:2], other[:2], strict=True)) == sampler.distance + 6
    pairs = images.is_same_class(10, distance=0)
    with pytest.raises(OptionError, match="no patches 'discs'; there is images"):
        penalty_of(settings, "igc", 3, pairs)


@pytest.mark.parametrize("package", ["skimage", "tensorly.datasets"])
def test_packages_that_are_missing(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    source, extra = {"skimage": ("photos", "images")}.get(package, ("spectra", "data"))
    with pytest.raises(OptionError, match=rf"not installed: pip install 'tnreg\[{extra}\]'"):
        images.is_same_class(2, source=source, distance=0)


@pytest.mark.parametrize("kind", [np.float64, np.uint8, torch.bfloat16])
def test_pairs_of_ones_own_images(kind):
    """Of any shape; two thirds of every class for training, and the pixels of the rest for test."""
    classes = np.repeat([7, -2, 40], [4, 10, 30])
    small = np.arange(44)[:, None, None, None] + np.zeros((44, 3, 2, 5))
    given = torch.tensor(small, dtype=kind) if isinstance(kind, torch.dtype) else small.astype(kind)
    used, counts = [], {}
    for split in ("train", "test"):
        found = images.is_same_class(600, distance=3, source=(given, classes), split=split, canvas=(4, 15))
        assert found.images.shape == (600, 3, 4, 15) and found.boxes == ((1, 1, 3, 6), (1, 9, 3, 14))
        assert found.images.dtype == (np.uint8 if kind == np.uint8 else np.float32)
        left, right = (found.images[:, 0, 1, box[1]].astype(int) for box in found.boxes)
        assert np.array_equal(classes[left] == classes[right], found.labels == 1) and (left != right).all()
        used.append(set(left) | set(right))
        counts[split] = [sum(classes[i] == value for i in used[-1]) for value in (7, -2, 40)]
    assert not used[0] & used[1] and counts == {"train": [2, 6, 20], "test": [2, 4, 10]}


@pytest.mark.parametrize("distance", [0, 8, 16, 24])
def test_control_boxes(distance):
    pairs = images.is_same_class(2, distance=distance)
    used = np.zeros((8, 40), dtype=int)
    for top, left, bottom, right in (*pairs.boxes, *pairs.control_boxes):
        assert 0 <= left and right <= 40 and (bottom - top, right - left) == (8, 8)
        used[top:bottom, left:right] += 1
    assert used.max() == 1


def test_control_boxes_without_room():
    with pytest.raises(OptionError, match="no room for two boxes of 8 pixels beside"):
        _ = images.is_same_class(2, distance=12).control_boxes
    tall = images.is_same_class(2, distance=12, canvas=(24, 40))
    assert tall.boxes == ((8, 6, 16, 14), (8, 26, 16, 34))
    assert tall.control_boxes == ((0, 6, 8, 14), (0, 26, 8, 34))


PATHS = functools.partial(images.pathfinder, 5)
PAIRS = functools.partial(images.is_same_class, 10)
SMALL, CLASSES = np.random.default_rng(0).random((12, 1, 2, 3)), np.arange(12) % 3


def own(small=SMALL, classes=CLASSES, **options):
    return {"source": (small, classes), "distance": 0, **options}


test_refuses = refuses([
    (PATHS, {"size": 31}, OptionError, "size must be an integer >= 32"),
    (PATHS, {"size": 301}, OptionError, "size is 32 to 300 pixels, found 301"),
    (PATHS, {"length": 10, "size": 32}, OptionError,
     "paths of 10 paddles have no room on 32 pixels; at most 9"),
    (PATHS, {"length": 1}, OptionError, "length must be an integer >= 2"),
    (PATHS, {"split": "all"}, OptionError, "split must be 'train' or 'test', found 'all'"),
    (PATHS, {"seed": -1}, OptionError, "seed must be an integer >= 0"),
    (PATHS, {"workers": 0}, OptionError, "workers must be an integer >= 1"),
    (PAIRS, {"distance": 25}, OptionError, "25 apart, do not fit on 8x40.\n  distance: at most 24"),
    (PAIRS, {"distance": 0, "noise": -1.0}, OptionError, "noise must be a finite number >= 0"),
    (PAIRS, {"distance": -1}, OptionError, "distance must be an integer >= 0"),
    (PAIRS, {"distance": 0, "source": "nowhere"}, FileError, "no such file: .*data_batch_1"),
    (PAIRS, {"distance": 0, "canvas": (8.5, 40)}, OptionError, "canvas must be an integer >= 1, found 8.5"),
    (PAIRS, {"distance": 0, "canvas": 40}, OptionError, r"canvas is \(height, width\) in pixels, found 40"),
    (PAIRS, own(distance=10), OptionError, "2x3 pixels, 10 apart, do not fit on 2x15.\n  distance: at most"),
    (PAIRS, {"distance": 0, "source": SMALL}, OptionError, "'spectra', the folder of CIFAR-10, or .images"),
    (PAIRS, own(np.where(SMALL > 0.9, np.nan, SMALL)), DataError, "of 12 images have pixels that are not"),
    (PAIRS, own(SMALL * 1e300), DataError, "12 of 12 images have pixels that are not finite in single"),
    (PAIRS, own(SMALL[:, 0]), ShapeError, "images needs 4 axes, found shape .12, 2, 3."),
    (PAIRS, own(classes=CLASSES[:, None]), ShapeError, "classes needs 1 axes"),
    (PAIRS, own(classes=CLASSES[1:]), ShapeError, r"found images \(12, 1, 2, 3\) and classes \(11,\)"),
    (PAIRS, own(SMALL[:0], CLASSES[:0]), ShapeError, "images need pixels, and a class each"),
    (PAIRS, own(SMALL.astype(int)), DataError, "floating point or uint8, .* found torch.int64"),
    (PAIRS, own(classes=CLASSES / 2), DataError, "classes whole numbers; found .* torch.float64"),
    (PAIRS, own(classes=["a"] * 12), DataError, "source: classes cannot be read"),
    (PAIRS, own(classes=0 * CLASSES), DataError, "found 1 classes, and 12 images of class 0"),
    (PAIRS, own(classes=CLASSES + 5 * (np.arange(12) == 3)), DataError, "4 classes, and 1 images of class 5"),
    (PAIRS, own(classes=np.arange(12) // 9), DataError, "2 classes, and 3 images of class 1"),
    (PAIRS, own(np.ones((12, 1, 2, 3), "u1"), noise=0.1), OptionError, "noise is for images of floating"),
], by=lambda make, options: make(**options))  # fmt: skip


def cifar(folder, change):
    """A folder like that of the archive, with few images; the pickles are those of Python 2."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = (np.arange(30) % 10).tolist()
        data = rng.integers(1, 255, (30, 3072), dtype=np.uint8)
        data[:, 0] = k
        batch = {b"batch_label": name.encode(), b"labels": labels, b"data": data}
        batch |= {b"filenames": [b"a.png"] * 30, **change}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar(tmp_path):
    cifar(tmp_path, {})
    found = images.is_same_class(20, distance=40, source=str(tmp_path), canvas=(64, 128))
    assert found.images.shape == (20, 3, 64, 128) and found.images.dtype == np.uint8
    assert found.boxes == ((16, 12, 48, 44), (16, 84, 48, 116)) and found.labels.sum() == 10
    assert found.images[:, 0, 16, 12].max() < 5
    assert (found.images[:, :, :16] == np.array([125, 123, 114])[:, None, None]).all()  # the mean colour
    folder = str(tmp_path / "cifar-10-batches-py")
    test = images.is_same_class(4, distance=160, source=folder, split="test")
    assert test.images.shape == (4, 3, 224, 224) and (test.images[:, 0, 96, 0] == 5).all()
    assert found.sheet(tmp_path / "c.png", rows=2, columns=2).exists()


@pytest.mark.parametrize(("key", "value", "message"), [
    (b"labels", Bomb("made"), r"it asks for (posix|nt)\.mkdir"),
    (b"data", np.zeros((9, 1), "u1"), r"not a batch of CIFAR-10: .*\n.*data \(9, 1\) uint8"),
    (b"data", np.array([Bomb("made")] * 30), r"it asks for (posix|nt)\.mkdir"),
], ids=["code", "shape", "code in an array"])  # fmt: skip
def test_cifar_files_that_are_refused(tmp_path, monkeypatch, key, value, message):
    monkeypatch.chdir(tmp_path)
    cifar(tmp_path, {key: value})
    with pytest.raises(FileError, match=message):
        images.is_same_class(4, distance=0, source=str(tmp_path))
    assert not (tmp_path / "made").exists()


def test_load_refuses(tmp_path):
    np.savez(tmp_path / "other.npz", about=np.array('{"format": "x"}'))
    np.savez(tmp_path / "objects.npz", about=np.array([Bomb("made")], dtype=object))
    for name, message in [
        ("none", "no such image set"),
        ("other", "format 'x', this version reads 'tnreg.images/1'"),
        ("objects", "allow_pickle=False"),
    ]:
        with pytest.raises(FileError, match=message):
            images.load(tmp_path / f"{name}.npz")
