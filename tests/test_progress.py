"""Bars are on standard error, on terminals only, and nowhere else in the package than by ``progress``."""

import re
from pathlib import Path

import pytest
import torch
import zoo
from command import screen

import tnreg
from tnreg import ModeTree, images
from tnreg.experiments import convac, sweep
from tnreg.experiments.locality import comparison
from tnreg.machine.progress import advancing, shown_progress, working

PACKAGE = Path(tnreg.__file__).parent


def on_pathfinder(folder):
    """The sets of one distance, as a sweep makes them before its first training."""
    cell = {"set": "pathfinder", "distance": 3, "size": 32, "train": 20, "test": 10}
    (folder / "sets").mkdir(parents=True)
    comparison._prepare([cell], folder, True)


def on_probing():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(128, 1))
    pictures = zoo.randn(20, 1, 8, 16, dtype=torch.float32)
    tnreg.locality_profile(net, pictures, distances=(0, 4), pairs=2, progress=True)


DRAWN = {
    "epochs": lambda path: convac.run(convac.tiny, path, progress=True, onnx=False),
    "images, paths of 3 paddles": on_pathfinder,
    "images, paths of 4 paddles": lambda path: images.pathfinder(9, length=4, size=32, progress=True),
    "pairs of patches": lambda path: on_probing(),
    "cells": lambda path: sweep.run(lambda *_: {"y": 1}, [{"seed": 1}], path, workers=0, progress=True),
    "loss": lambda path: tnreg.fit(zoo.model_of(ModeTree.star(3)), lambda m: m.norm(), steps=10),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "draw"), DRAWN.items(), ids=DRAWN)
def test_drawn_on_a_terminal_and_not_into_a_file(text, draw, capsys, monkeypatch, tmp_path):
    draw(tmp_path / "file")
    assert capsys.readouterr() == ("", "")
    shown = screen(monkeypatch)
    draw(tmp_path / "terminal")
    assert text in shown.getvalue() and capsys.readouterr().out == ""


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
