"""The examples: ``python examples/X.py [OUT]`` writes OUT, prints what it found, and warns of nothing.

OUT is a file in the current folder if it is left out; ``--quick`` makes those with a training small.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(tmp_path):
    """``example(name, file)`` runs a script in a folder of its own; the file it wrote and what it said."""

    def run(name, file, *options):
        done = subprocess.run(
            [sys.executable, "-W", "error", FOLDER / f"{name}.py", file, *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert f"wrote {file}" in done.stdout
        return tmp_path / file, done.stdout

    return run


def picture(path):
    """Format and number of frames of an image with more than one colour, read whole."""
    with Image.open(path) as image:
        image.load()
        assert len(image.convert("RGB").getcolors(2**24)) > 1
        return image.format, getattr(image, "n_frames", 1)


def rows(said, pattern):
    """Numbers in the groups of every line that is like the pattern."""
    found = [match.groups() for match in re.finditer(pattern, said, re.MULTILINE)]
    assert found, said
    return [[float(part.replace(",", "")) for part in line] for line in found]


def test_every_example_is_tested():
    source = Path(__file__).read_text()
    scripts = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert len(scripts) == 6
    for name in scripts:
        assert f'example("{name}"' in source


def test_own_tree(example):
    """Joining the modes that belong together leaves less at the inner node than joining neighbours."""
    path, said = example("own_tree", "out.png")
    assert picture(path) == ("PNG", 1)
    [[own]] = rows(said, r"^  light .*effective rank (\S+)$")
    [[neighbours]] = rows(said, r"^  \(0, 1\) .*effective rank (\S+)$")
    assert 1 <= own < neighbours


def test_ranks_on_three_trees(example):
    path, said = example("ranks_on_three_trees", "out.png")
    assert picture(path) == ("PNG", 1)
    neighbours = rows(said, r"^  neighbours +\{\S+ +(\d+) +(\S+)$")
    own = rows(said, r"^  own +\{\S+ +(\d+) +(\S+)$")
    assert len(own) == len(neighbours) == 2
    for (rank, effective), (other_rank, other_effective) in zip(own, neighbours, strict=True):
        assert 1 < rank <= other_rank and 1 < effective < 0.8 * other_effective
    needed = rows(said, r"^  (?:star|neighbours|own) +([\d,]+) +([\d,]+) +([\d,]+)$")
    assert len(needed) == 6
    assert all(most > middle > least > 0 for most, middle, least in needed)


def test_missing_entries(example):
    path, said = example("missing_entries", "out.png", "--quick")
    assert picture(path) == ("PNG", 1)
    [[missing]] = rows(said, r"^missing ([\d,]+), held out")
    assert missing == 1754
    [[_, mean, _]] = rows(said, r"^mean +([\d,]+) +(\S+) +(\S+) *$")
    for name in ("tree", "tree found", "CP"):
        [[numbers, gaps, unseen, low, high]] = rows(
            said, rf"^{name} +([\d,]+) +(\S+) +(\S+) +(\S+) to (\S+)$"
        )
        assert numbers <= 300 and gaps < mean / 4 and low / 2 < unseen < 2 * high


def test_growing(example):
    path, said = example("growing", "out.gif", "--quick")
    kind, frames = picture(path)
    assert kind == "GIF" and frames > 5
    [[before, after]] = rows(said, r"^error on unseen pixels: (\S+) -> (\S+)$")
    assert after < 0.7 * before
    values = rows(said, r"^ +\d+ +(\S+) +(\S+) +\S+$")
    assert len(values) == 8
    assert values[0][1] > 0.5 * values[0][0] and values[1][1] < 0.1 * values[1][0]  # one by one


def test_digits_to_onnx(example):
    import onnx

    path, said = example("digits_to_onnx", "out.onnx", "--quick")
    network = onnx.load(path)
    onnx.checker.check_model(network)
    assert [output.name for output in network.graph.output] == ["y"]
    assert picture(path.with_suffix(".png")) == ("PNG", 1)
    [[here]], [[there]] = (rows(said, rf"^{name} +(\S+)$") for name in ("torch", "onnxruntime"))
    assert here == there > 30  # of 100; a tenth by chance


def test_far_dependencies(example):
    """Plain training stays near chance on new images; the term in the loss does not."""
    path, said = example("far_dependencies", "out.png", "--quick")
    assert picture(path) == ("PNG", 1)
    pattern = r"(\S+) % of the training images, (\S+) % of new ones$"
    [[_, plain]] = rows(said, rf"^plain: {pattern}")
    [[_, regularized]] = rows(said, rf"^with interaction rank: {pattern}")
    assert plain < 60 and regularized > plain + 8
