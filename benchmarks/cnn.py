"""The network of an 8x8 grid against hand-written torch: forward and backward at batch 256.

``python benchmarks/cnn.py [--device cuda] [--threads 2] [--out FILE.json]`` prints a table. Times are
medians over interleaved bursts; ratios compare rows of one block. Hand-written: one einsum for all
positions of a level, siblings next to each other, no scales, no checks. Quad tree of windows 2x2, 4 input
channels, 16 or 64 channels, one output, float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from steps import machine_name, measure
from torch import Tensor, nn

import tnreg

BATCH = 256


def stacked(x: Tensor, weights: list[Tensor]) -> Tensor:
    """``x`` (positions in the order of the tree, batch, channels); a weight per level."""
    for level, weight in enumerate(weights):
        if level:
            a, b, c, d = x.reshape(x.shape[0] // 4, 4, *x.shape[1:]).unbind(1)
            x = a * b * c * d
        x = torch.einsum("pbc,pcr->pbr", x, weight)
    return x[0, :, 0]


def convolutions(x: Tensor, weights: list[Tensor]) -> Tensor:
    """``x`` (batch, channels, height, width); shared filters."""
    for level, weight in enumerate(weights):
        if level:
            even, odd = x.unflatten(2, (-1, 2)).unbind(3)
            a, b = even.unflatten(3, (-1, 2)).unbind(4)
            c, d = odd.unflatten(3, (-1, 2)).unbind(4)
            x = a * b * c * d
        x = nn.functional.conv2d(x, weight)
    return x[:, 0, 0, 0]


def block(channels: int, share: bool, device: torch.device, rounds: int) -> dict[str, float]:
    """Milliseconds of every row."""
    tree = tnreg.ModeTree.grid((8, 8))
    random = torch.Generator().manual_seed(channels)
    x = torch.randn(BATCH, 4, 8, 8, generator=random).to(device)
    nets = {
        name: tnreg.ConvNet(
            tree, 4, channels, share=share, scaled=scaled, std=2 / channels**0.5, device=device,
            generator=torch.Generator().manual_seed(0),
        )
        for name, scaled in (("tnreg", True), ("tnreg, without scales", False))
    }  # fmt: skip
    net = nets["tnreg"]
    if share:
        weights = [conv.weight.detach().clone() for conv in net.convs.values()]
        plain, inputs = convolutions, x
    else:
        weights = [conv.weight.detach().clone() for conv in net.convs.values()]
        plain = stacked
        inputs = x.flatten(2).permute(2, 0, 1)[list(net.network.tree.leaf_order)].contiguous()
    for weight in weights:
        weight.requires_grad_()
    value = plain(inputs, weights)
    assert torch.allclose(net(x), value, rtol=1e-3, atol=1e-4 * float(value.detach().abs().max()))

    def step(net: nn.Module) -> None:
        net.zero_grad()
        net(x).sum().backward()

    def by_hand() -> None:
        for weight in weights:
            weight.grad = None
        plain(inputs, weights).sum().backward()

    rows = {name: (lambda net=net: step(net)) for name, net in nets.items()}
    return measure({**rows, "hand-written": by_hand}, device, rounds)


def main() -> None:
    """Run both blocks, print them, and write the figures if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    times = {
        f"{channels} channels, {'shared filters' if share else 'locally connected'}": block(
            channels, share, device, arguments.rounds
        )
        for channels in (16, 64)
        for share in (False, True)
    }
    figures = {"machine": machine_name(device, arguments.threads), "milliseconds": times}
    print(figures["machine"])
    for name, rows in times.items():
        for row, time in rows.items():
            print(f"{name:36s} {row:24s} {time:8.2f} ms {time / rows['hand-written']:6.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
