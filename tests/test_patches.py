"""Boxes and samplers: what is drawn, how often, and that it is drawn again after a restart."""

from collections import Counter
from itertools import product

import pytest
import torch

from tnreg.errors import OptionError, ShapeError
from tnreg.far import patches

PAIR = ((0, 0, 2, 3), (4, 4, 6, 5))
THREE = [(0, 0, 1, 1), (0, 2, 2, 4), (3, 0, 5, 5)]


def drawn(sampler, x, count):
    return [tuple(map(tuple, sampler.draw(x).tolist())) for _ in range(count)]


def gap(a, b):
    return max(max(a[k], b[k]) - min(a[k + 2], b[k + 2]) for k in (0, 1))


def pairs(height, width, size, distance, exact):
    corners = product(range(height - size + 1), range(width - size + 1))
    gaps = {p: gap(*p) for p in product([(i, j, i + size, j + size) for i, j in corners], repeat=2)}
    return {pair for pair, g in gaps.items() if g == distance or (g > distance and not exact)}


def assert_uniform(found, expected):
    """Every pair and no other, as often as chance says: each of them, and all together by chi squared."""
    counts = Counter(found)
    assert set(counts) == set(expected)
    mean = len(found) / len(expected)
    assert all(abs(n - mean) < 6 * mean**0.5 for n in counts.values())
    free = len(expected) - 1
    spread = sum((n - mean) ** 2 for n in counts.values()) / mean
    assert spread < free + 4 * (2 * free) ** 0.5


def test_a_pair_is_used_as_given():
    sampler = patches.as_sampler(PAIR, "penalty")
    assert drawn(sampler, torch.zeros(2, 1, 6, 5), 2) == [PAIR, PAIR]
    assert sampler.state_dict() == {} and patches.as_sampler(sampler, "penalty") is sampler
    sampler.load_state_dict({})


def test_preset_boxes_are_drawn_in_both_orders():
    expected = [(a, b) for a, b in product(THREE, THREE) if a != b]
    assert_uniform(drawn(patches.PresetPatches(THREE, seed=1), torch.zeros(2, 5, 5), 300), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "size", "distance", "exact"),
    [(3, 3, 1, 0, False), (3, 6, 2, 0, False), (5, 5, 2, 1, False), (4, 5, 2, 0, True), (3, 5, 1, 2, True)],
)  # fmt: skip
def test_random_patches_are_uniform(height, width, size, distance, exact):
    sampler = patches.RandomPatches(size, distance, exact=exact, seed=2)
    expected = pairs(height, width, size, distance, exact)
    found = drawn(sampler, torch.zeros(2, 1, height, width), 60 * len(expected))
    assert_uniform(found, expected)


def test_default_is_the_published_one():
    [(a, b)] = drawn(patches.RandomPatches(), torch.zeros(2, 1, 150, 150), 1)
    assert (a[2] - a[0], a[3] - a[1]) == (2, 2) and gap(a, b) >= 0


def test_differing_patches_are_where_samples_differ():
    """Two samples differ in one pixel, three hold a spot elsewhere in common."""
    x = torch.zeros(3, 2, 6, 7)
    x[:, 0, 4, 5] = 1.0
    x[1, 1, 1, 1] = 0.5
    for i, j in drawn(patches.DifferingPatches(2, seed=3), x, 200):
        assert j[0] <= 1 < j[2] and j[1] <= 1 < j[3]
        assert (i[0] <= 4 < i[2] and i[1] <= 5 < i[3]) and gap(i, j) >= 0


def test_differing_patches_in_proportion():
    """One place changes two of four samples, one all four: 1 to 2."""
    x = torch.zeros(4, 1, 1, 9)
    x[0, 0, 0, 0] = 1.0  # swaps change sample 0 and the one that takes its pixels
    x[0, 0, 0, 8] = x[2, 0, 0, 8] = 1.0
    found = Counter(j[1] for _, j in drawn(patches.DifferingPatches(1, seed=4), x, 900))
    assert set(found) == {0, 8} and found[8] / found[0] == pytest.approx(2, rel=0.3)


def test_differing_patches_keep_the_distance_and_fall_back_to_uniform():
    same = torch.ones(3, 1, 4, 5)
    expected = pairs(4, 5, 2, 0, True)
    found = drawn(patches.DifferingPatches(2, 0, exact=True, seed=5), same, 800)
    assert set(found) <= expected and {j for _, j in found} == {j for _, j in expected}
    tiny = torch.ones(3, 1, 4, 5)
    tiny[0, 0, 0, 0] += 1e-3
    found = drawn(patches.DifferingPatches(1, threshold=1e-2, seed=6), tiny, 200)
    assert len({j for _, j in found}) > 10
    assert {j for _, j in drawn(patches.DifferingPatches(1, seed=6), tiny, 50)} == {(0, 0, 1, 1)}


def make(kind, seed=0):
    return kind(THREE if kind is patches.PresetPatches else 1, seed=seed)


@pytest.mark.parametrize("kind", [patches.PresetPatches, patches.RandomPatches, patches.DifferingPatches])
def test_streams_are_their_own(kind, tmp_path):
    x = torch.zeros(2, 1, 5, 5)
    before = torch.random.get_rng_state()
    found = drawn(make(kind, 7), x, 12)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert drawn(make(kind, 7), x, 12) == found != drawn(make(kind, 8), x, 12)
    for count in (0, 5):
        begun, resumed = make(kind, 7), make(kind)
        drawn(begun, x, count)
        torch.save(begun.state_dict(), tmp_path / "state")
        resumed.load_state_dict(torch.load(tmp_path / "state"))
        assert drawn(resumed, x, 12 - count) == found[count:]


@pytest.mark.parametrize("kind", [patches.RandomPatches, patches.DifferingPatches, patches.PresetPatches])
def test_drawing_reads_nothing_from_the_device(kind):
    """On the device "meta" nothing can be read: every wait for a device is an error there."""
    here, there, x = make(kind), make(kind), torch.zeros(2, 1, 5, 5)
    here.draw(x)
    assert there.draw(x.to("meta")).device.type == "meta"
    assert torch.equal(here.generator.get_state(), there.generator.get_state())


def test_places_without_weight_are_never_drawn():
    """Not even by the smallest and the largest number that there are."""
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0])
    for number, place in ((0.0, 1), (0.66, 1), (0.67, 3), (1 - 2**-53, 3)):
        drawn_place = patches._choose(weights, torch.tensor(number, dtype=torch.float64))
        assert drawn_place.tolist() == [place]


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_places_of_images_with_more_of_them_than_single_precision_counts(exact):
    x = torch.empty(1, device="meta").expand(2, 1, 4100, 4100)
    places = patches._Places(patches.RandomPatches(1, exact=exact), x, "cpu")
    counts = places.partners()
    for place in (0, 1, 4100 * 2050 + 2050):  # a corner, a side, the middle
        assert counts[place] == places.allowed(torch.tensor([place])).count_nonzero()


@pytest.mark.slow
def test_random_pairs_are_equally_likely_in_a_large_image():
    """Where there are more pairs than single precision counts."""
    pairs = drawn(patches.RandomPatches(2, seed=9), torch.zeros(2, 1, 150, 150), 3000)
    firsts = [i[0] for i, _ in pairs]
    assert sum(firsts) / 3000 == pytest.approx(74, abs=5 * 43 / 3000**0.5)
    assert len(set(firsts)) == 149


def test_refuses_boxes():
    other, single, several = (3, 3, 4, 4), patches.FixedPatches, patches.PresetPatches
    shape = r"a box is \(top, left, bottom, right\)"
    wrong = ((0, 0, 2), (0, 0, 0, 2), (-1, 0, 2, 2), (0, 0, 2.5, 2))
    for kind, boxes, message in (
        *((single, [box, other], shape) for box in wrong),
        (single, [], shape),
        (single, [1, 2], shape),
        (single, [(0, 0, 2, 2), (1, 1, 3, 3)], "overlap; patches must be disjoint"),
        (single, THREE, "two boxes, found 3; for more write PresetPatches"),
        (several, THREE[:1], "PresetPatches needs two boxes or more, found 1"),
        (several, [*THREE, (0, 0, 5, 5)], "overlap"),
    ):
        with pytest.raises(OptionError, match=message):
            kind(boxes)
    for kind in (single, several):
        with pytest.raises(ShapeError, match=r"box \(4, 4, 6, 5\) is not inside an image of 5 x 5"):
            kind(PAIR).draw(torch.zeros(2, 1, 5, 5))


@pytest.mark.parametrize("kind", [patches.RandomPatches, patches.DifferingPatches])
def test_refuses_options(kind):
    for name, value, least in (("size", 0, 1), ("distance", -1, 0), ("seed", -1, 0)):
        with pytest.raises(OptionError, match=f"{name} must be an integer >= {least}"):
            kind(**{name: value})
    for x, most in ((torch.zeros(2, 1, 8, 9), 5), (torch.zeros(2, 1, 1, 9), 5)):
        with pytest.raises(ShapeError, match=f"gap can be at most {most}"):
            kind(2, 6).draw(x)
    assert gap(*drawn(kind(2, 5), torch.zeros(2, 1, 8, 9), 1)[0]) == 5
    with pytest.raises(OptionError, match="not the state of its random stream"):
        kind(2).load_state_dict({})
    with pytest.raises(OptionError, match="threshold must be a finite number >= 0"):
        patches.DifferingPatches(threshold=-1.0)
    with pytest.raises(OptionError, match="patches must be a pair of boxes .* found 3"):
        patches.as_sampler(3, "penalty")
