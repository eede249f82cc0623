"""Digits classified by the network that a tree is, on three trees; then shrunk; then run by onnxruntime.

scikit-learn's 8x8 digits, one pixel a patch. The quad tree pools neighbouring pixels first, the mirrored
one a pixel with its mirror image, the random one pixels drawn by chance: which dependencies are cheap for
a network of that depth is decided by the tree (Cohen and Shashua 2017, arXiv:1605.06743).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnreg import algebra, plots
from tnreg.cnns.classifier import ConvAC, Representation
from tnreg.cnns.convnet import ConvNet
from tnreg.cnns.export import export_onnx
from tnreg.errors import OptionError
from tnreg.experiments.folder import UNREADABLE, plain_config, read_about, reading, write_about
from tnreg.experiments.sweep.pictures import means
from tnreg.factorizations.components import drop_components
from tnreg.images.sources import load_digits
from tnreg.machine.files import folder_written_whole
from tnreg.machine.progress import advancing
from tnreg.plots import save_figure
from tnreg.ranks.decompose import truncate
from tnreg.trees.drawing import plain_label
from tnreg.trees.tree import ModeTree, read_tree

_SIDE = 8
_Split = dict[str, tuple[Tensor, Tensor]]  # images and labels of "train" and "test"


@dataclass(frozen=True)
class Config:
    """Settings of one comparison; chosen on seed 0.

    Attributes:
        trees: ``quad``, ``mirrored``, ``random``, or what ``tnreg tree`` reads, over 64 pixels.
        channels: Size of every bond.
        templates, kind: Number and kind of the template functions per pixel.
        epochs, batch, lr: Passes over the training images, images in an update, learning rate of Adam.
        std: Spread of the initial filters around averaging.
        test: Share of the images that test.
        seeds: Each draws a split, a random tree and initial filters.
        rtols: Relative errors of the truncated tensors.
        thin: Local components below these shares of the largest at their node are dropped.
    """

    trees: tuple[str, ...] = ("quad", "mirrored", "random")
    channels: int = 16
    templates: int = 2
    kind: str = "sine"
    epochs: int = 40
    batch: int = 64
    lr: float = 1e-2
    std: float = 1.0
    test: float = 1 / 3
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    rtols: tuple[float, ...] = (0.3, 0.1, 0.03)
    thin: tuple[float, ...] = (0.01, 0.1, 0.3)
    device: str = "cpu"


tiny = Config(("quad", "random"), channels=3, epochs=1, seeds=(1, 2), rtols=(0.5,), thin=(0.5,))


def run(config: Config, folder: str | Path, *, progress: bool = False, onnx: bool = True) -> dict[str, Any]:
    """Train, shrink, export, draw, and return the summary.

    ``config.json``, the classifiers and the picture go to the folder, which appears as a whole. With
    ``onnx`` the first seed's classifiers are exported and onnxruntime's decisions compared with them (needs
    the extra ``onnx``).

    Raises:
        OptionError: No trees or seeds, or scikit-learn is missing.
    """
    if not config.trees or not config.seeds:
        raise OptionError("convac: give at least one tree and one seed.", argument="trees")
    pixels, classes = load_digits()
    images = torch.tensor(pixels / 16, dtype=torch.float32, device=config.device)
    images, labels = images.reshape(-1, 1, _SIDE, _SIDE), torch.tensor(classes, device=config.device)
    start, config = time.perf_counter(), plain_config(config)
    rows, smaller = list[dict[str, Any]](), list[dict[str, Any]]()
    epochs = len(config.seeds) * len(config.trees) * config.epochs
    with (
        folder_written_whole(folder, "convac", _files(folder)) as beside,
        advancing("epochs", epochs, progress) as advance,
    ):
        for seed in config.seeds:
            random = torch.Generator().manual_seed(seed)
            order = torch.randperm(len(images), generator=random)
            first = round(len(images) * config.test)
            parts = {"train": order[first:], "test": order[:first]}
            split = {name: (images[part], labels[part]) for name, part in parts.items()}
            rows.append({"seed": seed, "model": "logistic regression", **_logistic(split)})
            for name in config.trees:
                began = time.perf_counter()
                model = _train(tree_of(name, seed), config, split, seed, advance)
                rates = {name: _accuracy(model, *part) for name, part in split.items()}
                cost = {"weights": _count_weights(model), "seconds": time.perf_counter() - began}
                rows.append({"seed": seed, "model": name, **rates, **cost})
                if seed == config.seeds[0]:
                    model.save(beside / f"{name}.safetensors")
                    smaller += [{"model": name, **row} for row in _shrink(model, config, split)]
                    if onnx:
                        equal = _compare_onnxruntime(model, beside / f"{name}.onnx", split)
                        rows[-1]["equal decisions in onnxruntime"] = equal
        summary = {
            "accuracy": rows,
            "mean and spread": {
                mean["model"]: [mean["test"], float(np.nan_to_num(mean["deviation"]))]
                for mean in means(rows, ["model"], "test")
            },
            "smaller": smaller,
            "seconds": time.perf_counter() - start,
        }
        write_about(beside, "convac", config=dataclasses.asdict(config), summary=summary)
        figure(beside)
    return summary


def _files(folder: str | Path) -> list[str]:
    """Return the names of what a run in this folder wrote."""
    with contextlib.suppress(*UNREADABLE):
        trees = read_about(folder)["config"]["trees"]
        models = [f"{name}.{suffix}" for name in trees for suffix in ("safetensors", "onnx")]
        return ["config.json", "convac.png", *models]
    return []


def tree_of(name: str, seed: int = 0) -> ModeTree:
    """Return a tree over the 64 pixels: three levels of four children each, or what ``read_tree`` takes."""
    pixels = np.arange(_SIDE**2).reshape(_SIDE, _SIDE)
    if name == "mirrored":  # a column beside its mirror image
        half = np.arange(_SIDE // 2)
        pixels = pixels[:, np.stack([half, _SIDE - 1 - half], 1).reshape(-1)]
    elif name == "random":
        pixels = np.random.default_rng(seed).permutation(pixels.reshape(-1)).reshape(_SIDE, _SIDE)
    elif name != "quad":
        tree = read_tree(name)
        if tree.order != _SIDE**2:
            message = f"the digits have {_SIDE**2} pixels, the tree {name!r} {tree.order} modes."
            raise OptionError(message, argument="trees")
        return tree
    quad = ModeTree.grid((_SIDE, _SIDE)).leaf_order
    return ModeTree(pixels.reshape(-1)[list(quad)].reshape(4, 4, 4).tolist())


@torch.no_grad()
def _accuracy(model: ConvAC, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


def _logistic(split: _Split) -> dict[str, Any]:
    from sklearn.linear_model import LogisticRegression

    flat = {name: (x.flatten(1).cpu().numpy(), y.cpu().numpy()) for name, (x, y) in split.items()}
    began = time.perf_counter()
    model = LogisticRegression(max_iter=2000).fit(*flat["train"])
    rates = {name: float(model.score(*part)) for name, part in flat.items()}
    weights = int(model.coef_.size + model.intercept_.size)
    return {**rates, "weights": weights, "seconds": time.perf_counter() - began}


def _train(
    tree: ModeTree, config: Config, split: _Split, seed: int, advance: Callable[[int], None]
) -> ConvAC:
    random = torch.Generator().manual_seed(seed)
    representation = Representation(config.templates, kind=config.kind, generator=random)
    net = ConvNet(tree, config.templates, config.channels, outputs=10, shape=(_SIDE, _SIDE))
    model = ConvAC(representation, net).start_averaging_(std=config.std, generator=random)
    model = model.to(config.device)
    adam = torch.optim.Adam(model.parameters(), lr=config.lr)
    images, labels = split["train"]
    for _ in range(config.epochs):
        order = torch.randperm(len(images), generator=random)
        for batch in torch.split(order, config.batch):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
        advance(1)
    return model


def _shrink(model: ConvAC, config: Config, split: _Split) -> list[dict[str, Any]]:
    """Return accuracy and weights after truncation and after dropping components, on the test images."""
    tensor = model.factorization().double()
    norm = float(tensor.norm().detach())
    ways = [("truncated", rtol, truncate(tensor, rtol=rtol)) for rtol in config.rtols]
    ways += [("thinned", share, drop_components(tensor, below=share)) for share in config.thin]
    rows = []
    for how, asked, smaller in ways:
        shrunk = model.with_factorization(smaller)
        error = float(algebra.subtract(tensor, smaller).norm().detach())
        row = {"how": how, "asked": asked, "test": _accuracy(shrunk, *split["test"])}
        row |= {"error": error / norm, "bound": (smaller.error_bound or 0.0) / norm}
        row |= {"weights": _count_weights(shrunk), "largest bond": max(smaller.network.bonds[:-1])}
        rows.append(row)
    return rows


def _compare_onnxruntime(model: ConvAC, path: Path, split: _Split) -> float:
    """Return the share of test images on which the exported file decides as the classifier does."""
    export_onnx(model, path)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images, _ = split["test"]
    [scores] = session.run(None, {"x": images.cpu().numpy()})
    return float((scores.argmax(1) == model(images).argmax(1).cpu().numpy()).mean())


def _count_weights(model: ConvAC) -> int:
    return sum(p.numel() for p in model.parameters())


def figure(folder: str | Path, png: str | Path | None = None) -> Path:
    """Draw tree and network, accuracies by tree and when shrunk, into ``convac.png`` or another file."""
    from matplotlib.figure import Figure

    folder = Path(folder)
    with reading("a convac run", folder):
        about = read_about(folder)
        summary, trees = about["summary"], about["config"]["trees"]
        model = ConvAC.load(folder / f"{trees[0]}.safetensors")
    whole: Any = Figure(figsize=(13, 7.5), layout="constrained")
    upper, lower = whole.subfigures(2, 1)
    left, right = upper.subplots(1, 2, width_ratios=[1, 1.2])
    plots.tree(model.net.tree, left, labels=dict.fromkeys(model.net.tree.leaves, ""))
    left.set_title(plain_label(f"{trees[0]} tree over the pixels"))
    plots.network(model.net, right)
    right.set_title("the network that it is")
    first, second = lower.subplots(1, 2, width_ratios=[1, 1.2])
    mean, spread = 100 * np.array(list(summary["mean and spread"].values())).T
    plots.bars(
        dict(zip(summary["mean and spread"], mean, strict=True)),
        first,
        unit="test accuracy, %",
        errors=np.nan_to_num(spread),
    )
    low = float((mean - 2 * spread).min())
    first.set_xlim(max(0, math.floor(low / 5) * 5 - 5), 100)
    first.set_title(f"mean and standard deviation over {len(about['config']['seeds'])} seeds")
    for how, marker, line in (("truncated", "o", "-"), ("thinned", "s", ":")):
        for k, tree in enumerate(trees):
            rows = [r for r in summary["smaller"] if r["how"] == how and r["model"] == tree]
            second.plot([r["weights"] for r in rows], [100 * r["test"] for r in rows],
                        marker=marker, color=f"C{k}", ls=line,
                        label=plain_label(f"{tree}, {how}"))  # fmt: skip
    second.set(xscale="log", xlabel="weights", ylabel="test accuracy, %")
    second.axvline(_count_weights(model), color="0.7", lw=1)
    second.set_title("shrunk (grey: weights as trained)")
    second.legend(fontsize=7)
    return save_figure(whole, png or folder / "convac.png")
