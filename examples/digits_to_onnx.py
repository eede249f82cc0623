"""A classifier that is a tree: trained on digits, written as ONNX, and read back without tnreg.

``python examples/digits_to_onnx.py [network.onnx] [--quick]`` trains a convolutional arithmetic circuit over
the quad tree of 8x8 pixels on scikit-learn's digits, exports it, and lets onnxruntime decide on the test
images; a picture of some of them goes beside the file. For your own images change ``digits``, the size of the
grid and ``outputs``. Needs ``tnreg[images,onnx]``; ``--quick`` trains one epoch, for tests.

One run, 22 s in one thread: 7,328 weights, 94.3 % of the 599 test images right, the same decision by
onnxruntime on all of them, scores at most 6e-6 apart.
"""

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tnreg


def digits(random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load images (B, 1, 8, 8) between 0 and 1 with labels: two thirds to train, one third to test."""
    pixels, numbers = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=random)
    x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    y, count = torch.tensor(numbers)[order], len(order) // 3
    return x[count:], y[count:], x[:count], y[:count]


def train(x: Tensor, y: Tensor, epochs: int, random: torch.Generator) -> tnreg.ConvAC:
    """Train two template functions a pixel, sixteen channels, one root vector a class; an ordinary loop."""
    net = tnreg.ConvNet(tnreg.ModeTree.grid((8, 8)), 2, 16, outputs=10)
    model = tnreg.ConvAC(tnreg.Representation(2, kind="sine"), net)
    model.start_averaging_(generator=random)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=random).split(64):
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def main(path: Path, epochs: int, seed: int = 6) -> None:
    """Train, export, read back, compare, and draw."""
    random = torch.Generator().manual_seed(seed)
    x, y, test_x, test_y = digits(random)
    model = train(x, y, epochs, random)
    # checked with onnxruntime on fresh inputs before it is put there
    tnreg.export_onnx(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    [scores] = session.run(None, {"x": test_x.numpy()})
    decided = scores.argmax(1)
    with torch.no_grad():
        here, fitted = model(test_x), (model(x).argmax(1) == y).double().mean()
    truth, weights = test_y.numpy(), sum(w.numel() for w in model.parameters())
    print(f"{weights:,} weights, {path.stat().st_size:,} bytes, {100 * fitted:.1f} % in training")
    print("                test accuracy, %")
    print(f"torch        {100 * np.mean(here.argmax(1).numpy() == truth):19.2f}")
    print(f"onnxruntime  {100 * np.mean(decided == truth):19.2f}")
    print(f"same decision on {100 * np.mean(here.argmax(1).numpy() == decided):.1f} % of {len(decided)}")
    print(f"largest difference of a score: {np.abs(here.numpy() - scores).max():.1e}")

    wrong = np.flatnonzero(decided != truth)[:8]
    right = np.flatnonzero(decided == truth)[: 16 - len(wrong)]
    figure = Figure(figsize=(10, 3), layout="constrained")
    for ax, n in zip(figure.subplots(2, 8).flat, [*wrong, *right], strict=True):
        ax.imshow(test_x[n, 0].numpy(), cmap="gray_r")
        color = "black" if decided[n] == truth[n] else "C3"
        ax.set_title(f"{decided[n]}, is {truth[n]}", color=color, fontsize=9)
        ax.set_axis_off()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=100)
    print(f"wrote {path} and {picture}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Digits classified by a tree, exported to ONNX.")
    parser.add_argument("out", nargs="?", default="digits_to_onnx.onnx", help="the network")
    parser.add_argument("--quick", action="store_true", help="one epoch, for tests")
    arguments = parser.parse_args()
    main(Path(arguments.out), 1 if arguments.quick else 20)
