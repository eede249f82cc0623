"""Bars are on standard error, on terminals only, and nowhere else in the package than by ``progress``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from command import screen

import tnreg
from tnreg import images
from tnreg.experiments import convac, sweep
from tnreg.experiments.locality import comparison
from tnreg.machine.progress import advancing, shown_progress, working

PACKAGE = Path(tnreg.__file__).parent


def in_a_sweep(folder):
    sweep.run(lambda cell, *_: {"y": 1}, [{"seed": 1}], folder, workers=0, progress=True)


def on_pathfinder(folder):
    """The sets of one distance, as a sweep makes them before its first training."""
    cell = {"set": "pathfinder", "distance": 3, "size": 32, "train": 20, "test": 10}
    (folder / "sets").mkdir(parents=True)
    comparison._prepare([cell], folder, True)


def on_digits(folder):
    convac.run(convac.tiny, folder, progress=True, onnx=False)


def on_probing():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 1))
    pictures = torch.rand(20, 1, 8, 16, generator=torch.Generator().manual_seed(0))
    tnreg.locality_profile(net, pictures, distances=(0, 4), pairs=2, progress=True)


DRAWN = {
    "epochs": lambda path: on_digits(path / "r"),
    "images, paths of 3 paddles": on_pathfinder,
    "images, paths of 4 paddles": lambda path: images.pathfinder(9, length=4, size=32, progress=True),
    "pairs of patches": lambda path: on_probing(),
    "cells": in_a_sweep,
}


@pytest.mark.parametrize(("text", "draw"), DRAWN.items(), ids=DRAWN)
def test_drawn_on_a_terminal(text, draw, capsys, monkeypatch, tmp_path):
    shown = screen(monkeypatch)
    draw(tmp_path)
    assert text in shown.getvalue() and capsys.readouterr().out == ""


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_nothing_is_drawn_into_a_file(draw, capsys, tmp_path):
    draw(tmp_path)
    out, err = capsys.readouterr()
    assert out == "" and err == ""


def test_line_while_working(capsys, monkeypatch):
    shown = screen(monkeypatch)
    with advancing("steps", 3, False) as advance, working("looking ...", False) as say:
        advance(3)
        say("still looking ...")
    assert shown.getvalue() == ""  # not wanted
    with working("looking ...") as say:
        say("still looking ...")
    assert "looking ..." in shown.getvalue() and capsys.readouterr().out == ""


def test_progress_counts_where_nobody_sees_it():
    with shown_progress() as bar:
        task = bar.add_task("steps", total=3)
        bar.advance(task, 2)
        assert bar.disable and bar.tasks[0].completed == 2


def test_no_bar_is_made_elsewhere():
    """Bars of rich, tqdm or any other kind on standard output would end up in pipes."""
    made = re.compile(r"\bProgress\(|\.status\(|\btqdm\b|\btrack\(|\bLive\(")
    found = {path.name for path in PACKAGE.rglob("*.py") if made.search(path.read_text("utf-8"))}
    assert found == {"progress.py"}
