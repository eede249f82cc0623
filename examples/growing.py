"""Learning one rank after another, as a film: singular values over training beside the picture they make.

``python examples/growing.py [film.gif] [--quick]`` completes a picture of overlapping boxes from half of its
pixels with three matrices multiplied, started near zero. A plateau is a picture of low rank; every jump adds
one singular value, and with it one more shape. Larger initial weights (``std``) let all of them grow at once.
For your own data replace ``boxes``; for a tensor also ``tree``, and watch ``Factorization.local_components``
or ``tnreg.spectra``. ``--quick`` makes fewer steps and frames, for tests.

One run, 18 s in one thread: the five singular values of the picture (35.0, 17.5, 8.2, 2.1, 1.1) reach half
their size at steps 300, 1,400, 2,100, 3,300 and 3,700, the sixth stays 0; error on unseen pixels 0.025.
"""

import argparse

import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from torch import Tensor

import tnreg

SIDE, SHOWN = 40, 8


def boxes(count: int, seed: int) -> Tensor:
    """Draw so many boxes of random places and shades on top of each other: a picture of that rank."""
    random = torch.Generator().manual_seed(seed)
    picture, places = torch.zeros(SIDE, SIDE), torch.arange(SIDE)
    for _ in range(count):
        first = torch.randint(0, SIDE - 8, (2,), generator=random)
        last = first + torch.randint(8, 20, (2,), generator=random)
        row, column = [(places >= a) & (places < b) for a, b in zip(first, last, strict=True)]
        picture += (0.5 + torch.rand(1, generator=random)) * torch.outer(row, column)
    return picture / picture.square().mean().sqrt()


def main(path: str, steps: int, frames: int, seed: int = 1) -> None:
    """Train, print when each singular value appeared, and write the film."""
    picture = boxes(5, seed)
    task = tnreg.completion(picture, 0.5, seed=seed)
    tree = tnreg.ModeTree.chain(3)
    random = torch.Generator().manual_seed(seed)
    model = tnreg.Factorization(tree, SIDE, SIDE, root="ones", std=1e-2, generator=random)
    observe = {
        "test error": task.test_error,
        "singular values": lambda m: tnreg.spectra(m)[tree.nodes[0]][:SHOWN],
        "picture": lambda m: m.to_tensor(),
    }
    run = tnreg.fit(model, task.loss, steps=steps, every=steps // frames, observe=observe, progress=False)
    values, true = run["singular values"], torch.linalg.svdvals(picture)[:SHOWN]
    print("singular value   of the picture   learned   half of it at step")
    for k in range(SHOWN):
        late = values[:, k] > 0.5 * float(true[k])
        when = f"{run.steps[late.argmax()]:,}" if late.any() and true[k] > 1e-3 else "-"
        print(f"{k + 1:14} {float(true[k]):16.2f} {values[-1, k]:9.2f} {when:>21}")
    print(f"error on unseen pixels: {run['test error'][0]:.3f} -> {run['test error'][-1]:.3f}")

    observed = torch.full((SIDE, SIDE), torch.nan)
    observed[tuple(task.index.T)] = task.values
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    lines, left, right = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    curves = lines.plot(run.steps, values)
    lines.hlines(true[true > 1e-3].numpy(), 0, steps, color="0.6", ls=":", lw=1)
    lines.set(xlabel="step", title="singular values; dotted: of the whole picture")
    left.imshow(observed.numpy(), cmap="magma", vmin=0, vmax=float(picture.max()))
    left.set(title="pixels observed", xticks=[], yticks=[])
    image = right.imshow(run["picture"][0], cmap="magma", vmin=0, vmax=float(picture.max()))
    right.set(title="learned", xticks=[], yticks=[])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not in every frame

    def draw(row: int) -> None:
        for k, line in enumerate(curves):
            line.set_data(run.steps[: row + 1], values[: row + 1, k])
        image.set_data(run["picture"][row])
        right.set_title(f"learned, step {run.steps[row]:,}: {run['test error'][row]:.2f} off")

    FuncAnimation(figure, draw, frames=len(run)).save(path, writer=PillowWriter(fps=10), dpi=70)
    print(f"wrote {path}, {len(run)} frames")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Incremental learning of a picture, as a GIF.")
    parser.add_argument("out", nargs="?", default="growing.gif", help="the film")
    parser.add_argument("--quick", action="store_true", help="fewer steps, for tests")
    arguments = parser.parse_args()
    main(arguments.out, *((300, 6) if arguments.quick else (5000, 50)))
