"""Pictures: every function draws what it was given, on axes given or new."""

import inspect
import subprocess
import sys

import numpy as np
import pytest
import torch
import zoo
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

import tnreg
from tnreg import ConvNet, ModeTree, OptionError, Trajectory, plots, spectra, to_cnn

TREE = ModeTree.binary(4)
MODEL = zoo.model_of(TREE)


@pytest.fixture(autouse=True)
def ax():
    yield Figure().subplots()
    plt.close("all")


@pytest.fixture
def run():
    run, parts = Trajectory(), MODEL.local_components()
    for step, vector in enumerate(np.random.default_rng(0).random((3, 2))):
        run.append(step, {"loss": 1 / (1 + step), "vector": vector, "parts": parts})
    return run


def texts(ax):
    return [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("tree", [*zoo.TREES.values(), ModeTree.grid((8, 8))])
def test_tree(tree, ax):
    drawn = plots.tree(tree, ax, edges={tree.nodes[0]: "rank 3"}, labels={0: "left"})
    assert drawn is ax and len(ax.lines) == len(tree.nodes) - 1
    assert "left" in texts(ax) and ("rank 3" in texts(ax)) == (len(tree.nodes) <= 48)
    ax.figure.canvas.draw()


def test_spectra(ax):
    values = spectra(MODEL)
    assert plots.spectra(values, ax) is ax
    for line, s in zip(ax.lines, values.values(), strict=True):
        relative = (s / s[0]).detach().numpy()
        assert np.allclose(line.get_ydata(), relative[relative > 1e-8])  # zeros are left out
    assert plots.spectra({0: torch.zeros(3)}, Figure().subplots()).lines


def test_spectra_that_lie_on_one_another_are_told_apart(ax):
    same = torch.tensor([1.0, 0.1, 0.01])
    plots.spectra({0: same, 1: 3 * same, 2: same**2}, ax)
    below, above, alone = (line.get_linewidth() for line in ax.lines)
    assert below > 2 * above and above == alone


@pytest.mark.parametrize("tree", [TREE, ModeTree.star(6), ModeTree.caterpillar(5)])
def test_labels_of_a_tree_are_apart_from_edges_and_each_other(tree, ax):
    ax.figure.set_size_inches(8, 5)
    plots.tree(tree, ax, edges=dict.fromkeys(tree.nodes[:-1], "12"))
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    lines = [line.get_transform().transform_path(line.get_path()) for line in ax.lines]
    named = [box for box, text in zip(boxes, ax.texts, strict=True) if text.get_text() != "12"]
    assert not any(line.intersects_bbox(box, filled=False) for line in lines for box in named)


def test_rates_have_a_symmetric_scale_and_a_colour_a_component(ax):
    measured = np.ma.masked_values([[1.0, -1e-3], [-0.5, 0.0], [7e5, 1e-2]], 7e5)  # no data, as NaN
    assert plots.rates(measured, ax, predicted=2 * measured, steps=[0, 5, 9]) is ax
    assert ax.get_yscale() == "symlog" and ax.get_ylim()[0] == -ax.get_ylim()[1] == -4
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1] != colours[2] == colours[3] and len(colours) == 4
    assert plots.rates(np.zeros((3, 1))).lines[0].get_xdata().tolist() == [0, 1, 2]
    for wrong in (
        {"data": [1.0]},
        {"data": measured, "predicted": [[1.0]]},
        {"data": measured, "steps": [1]},
    ):
        with pytest.raises(tnreg.ShapeError, match="rates are .rows, components., found"):
            plots.rates(**wrong)


def test_numbers_stand_beyond_their_error_bars(ax):
    plots.bars({"a": 1.0, "b": 2.0}, ax, errors=[0.5, 0.1])
    ax.figure.canvas.draw()
    ends = [ax.transData.transform((end, 0))[0] for end in (1.5, 2.1)]
    assert all(t.get_window_extent().x0 > end for t, end in zip(ax.texts, ends, strict=True))


def test_trajectory(ax, run):
    assert plots.trajectory(run, ax, names=["loss", "vector"]) is ax
    assert len(ax.lines) == 3 and ax.lines[0].get_ydata().tolist() == run["loss"].tolist()
    many = plots.trajectory(run, names=["parts"], log=False)
    assert many.get_yscale() == "linear"
    assert len(many.lines) == sum(v.shape[1] for v in run["parts"].values())


def test_components(ax, run):
    plots.components(run, ax, name="parts", top=2)
    root = run["parts"][0, 1, 2, 3]
    assert len(ax.lines) == 2 and ax.lines[0].get_ydata()[-1] == root[-1].max()
    plots.components(run, ax, name="parts", node=(0, 1))
    with pytest.raises(OptionError, match="no node 9"):
        plots.components(run, name="parts", node=9)
    with pytest.raises(OptionError, match="is no dict of nodes"):
        plots.components(run, name="loss")


def test_bars_and_new_axes():
    drawn = plots.bars({"a": 1.0, "b": 2.0})
    assert [p.get_width() for p in drawn.patches] == [1.0, 2.0]


@pytest.mark.parametrize(("name", "start"), [
    ("x.png", b"\x89PNG"), ("x.PDF", b"%PDF"), ("x.svg", b"<?xml"), ("x.eps", b"%!PS"),
    ("x.jpg", b"\xff\xd8"),
])  # fmt: skip
def test_the_suffix_says_the_format(tmp_path, ax, name, start):
    pairs = tnreg.images.ImageSet(np.zeros((2, 1, 4, 4)), np.arange(2), (), np.zeros(0), {})
    for write in (lambda path: plots.save_figure(ax.figure, path), pairs.sheet):
        path = write(tmp_path / name)
        assert path.read_bytes().startswith(start)
        for other in ("x.doc", "x", ".png"):
            with pytest.raises(
                OptionError, match=r"the suffix says how [^$]*expected: \.png, \.pdf"
            ) as error:
                write(tmp_path / other)
            assert error.value.argument == "figure"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_decomposition_shows_ranks_and_budget():
    """Every edge has its rank and what was cut; the squares add up to at most the bound's."""
    tensor = zoo.randn(4, 4, 4, 4)
    model = tnreg.decompose(tensor, TREE, rtol=0.5)
    left, right = plots.decomposition(spectra(tensor, TREE), model)
    cuts = [t.split(", cut ") for t in texts(right) if "cut" in t]
    assert len(cuts) == len(TREE.nodes) - 1 and len(left.lines) >= len(cuts)
    assert sorted(int(rank) for rank, _ in cuts) == sorted(model.network.bonds[:-1])
    assert any(float(share) > 0 for _, share in cuts)


def test_network_shows_every_layer():
    net = ConvNet(ModeTree.grid((4, 4)), 3, 8, outputs=10)
    ax = plots.network(net)
    pieces = "input, layer 0, layer 2, 16 × 3, 16 × 8, 4 × 8, 1 × 8, 1 × 10, linear"
    assert set(pieces.split(", ")) <= set(texts(ax))
    assert "4 × 2–7" in texts(plots.network(to_cnn(MODEL)))
    assert "1 × 27" in texts(plots.network(ConvNet(ModeTree.star(3), 2, 3, join="full")))
    assert len(ax.patches) == 1 + 3 + 2  # input, convolutions, poolings
    bare = ConvNet(ModeTree.star(3), 2, 3, leaves="bare")
    assert (
        "1x1\nconv" not in texts(plots.network(bare)) and len(plots.component(bare, (0, 1, 2))[1].images) == 1
    )
    assert texts(plots.network(tnreg.ConvAC(tnreg.Representation(3), net))) == texts(ax)
    with pytest.raises(OptionError, match=r"a ConvNet, found Factorization; .*to_cnn\(model\)"):
        plots.network(MODEL)
    with pytest.raises(OptionError, match="plots.component draws a ConvNet"):
        plots.component(MODEL, (0, 1))


def test_component_frames_its_filters():
    net = to_cnn(MODEL)
    left, right = plots.component(net, (0, 1), 1)
    frames = [(p.get_xy(), p.get_width(), p.get_height()) for p in right.patches]
    rows, bond = net.weights[0].shape
    assert frames[0] == ((1.0, -rows), 1, rows)  # column 1 of the first child's filters
    assert frames[2][1:] == (net.weights[(0, 1)].shape[1], 1) and frames[2][0][1] == -2
    assert len(right.images) == 3 and "{0,1}" in left.get_title()
    with pytest.raises(OptionError, match=f"has {bond} local components, found number 9"):
        plots.component(net, (0, 1), 9)
    with pytest.raises(OptionError, match="node 0 has 0 local components"):
        plots.component(net, 0)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_pictures(tmp_path):
    """Where files may not grow any more; PIL itself would leave half a JPEG and say nothing."""
    script = """if True:
        import resource, signal, numpy, matplotlib.figure, tnreg
        pairs = tnreg.images.ImageSet(numpy.random.rand(20, 1, 40, 40), numpy.arange(20) % 2, (), (), {})
        figure = matplotlib.figure.Figure()
        figure.subplots().imshow(numpy.random.rand(300, 300))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        writers = [pairs.sheet, lambda path: tnreg.plots.save_figure(figure, path)]
        for write, name in ((write, f"x.{end}") for write in writers for end in ("png", "jpg", "tif", "pdf")):
            try:
                write(name)
            except tnreg.FileError as error:
                print(str(error).split()[0])"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["cannot"] * 8 and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize("name", ["$x^$", r"$\no", "_a", "cost $"])
def test_names_are_drawn_as_they_are(name, ax):
    """No formulas of matplotlib, which would also be errors, and none left out of a legend."""
    values = {name: torch.ones(2), "b": torch.ones(2)}
    profile = tnreg.LocalityProfile((0, 4), np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3, 1)), 1)
    for axes in (plots.spectra(values, ax), plots.bars({name: 1.0}), plots.locality_profile({name: profile})):
        axes.figure.canvas.draw()
        drawn = [*(axes.get_legend().get_texts() if axes.get_legend() else axes.get_yticklabels())]
        assert drawn[0].get_text().replace(r"\$", "$").strip() == name
        assert drawn[0]._preprocess_math(drawn[0].get_text())[0].strip() == name


def test_every_plot_is_named():
    own = {name for name, value in vars(plots).items() if inspect.isfunction(value)
           and value.__module__ == "tnreg.plots" and not name.startswith("_")}  # fmt: skip
    assert own | {"node_text"} == set(plots.__all__)
