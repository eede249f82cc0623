"""Trajectories: rows, files, and what is refused."""

import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tnreg import DataError, FileError, OptionError, ShapeError, Trajectory


def example():
    run = Trajectory()
    for step in (0, 10, 20):
        run.append(step, {"loss": 1.0 / (step + 1), "vector": torch.full((3,), float(step)),
                          "parts": {(0, 1): torch.ones(2) * step, "top": np.array(step)}})  # fmt: skip
    run.stop_reason = "steps"
    return run


def test_rows():
    run = example()
    assert len(run) == 3 and run.steps.tolist() == [0, 10, 20] and run.steps.dtype == np.int64
    assert run.names == ("loss", "vector", "parts") == tuple(run) and "loss" in run
    assert run["vector"].shape == (3, 3) and run["parts"][0, 1].shape == (3, 2)
    assert run["parts"]["top"].tolist() == [0, 10, 20]
    assert "3 rows, last step 20: loss, vector, parts; steps" in repr(run)
    assert "running" in repr(Trajectory())
    assert run.last("loss").tolist() == [1 / 21] and len(run.last("loss", 9)) == 3
    assert run.last("parts", 2)[0, 1].tolist() == [[10, 10], [20, 20]]
    with pytest.raises(OptionError, match="nothing named 'c'"):
        run.last("c")
    run, value = Trajectory(), torch.zeros(2)
    run.append(0, {"x": value})
    value += 1
    assert run["x"].tolist() == [[0.0, 0.0]]  # a row is a copy


def test_a_mapping_and_a_frame():
    run = example()
    assert isinstance(run, Mapping) and run.get("x") is None and run != example() and run in {run}
    assert list(dict(run)) == list(run.keys()) == ["loss", "vector", "parts"]
    assert dict(run)["loss"].tolist() == run["loss"].tolist()
    with pytest.raises(OptionError, match=r"write run\[name\], or run.to_frame"):
        np.asarray(run)
    pandas = pytest.importorskip("pandas")
    run.append(30, {"loss": 0.0, "vector": [1.0, 2.0, 3.0], "parts": {(0, 1): [5.0, 6.0], "top": 7}})
    frame = run.to_frame()
    assert frame.index.tolist() == [0, 10, 20, 30] and frame.columns.names == ["name", "node", "component"]
    assert frame["loss"].squeeze().tolist() == run["loss"].tolist()
    assert frame["parts", "(0, 1)", 1].tolist() == [0, 10, 20, 6] and frame.shape == (4, 7)
    assert frame["vector"].to_numpy().tolist() == run["vector"].tolist()
    assert len(Trajectory().to_frame()) == 0
    scalars = Trajectory()
    scalars.append(0, {"a": 1.0, "m": torch.eye(2)})
    assert scalars.to_frame()["m", "", "0,1"].item() == 0.0
    assert pandas.DataFrame({"a": scalars["a"]})["a"].tolist() == [1.0]


def test_to_frame_needs_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(OptionError, match=r"pip install 'tnreg\[data\]'"):
        example().to_frame()


def test_files(tmp_path):
    run = example()
    run.save(tmp_path / "run.npz")
    for again in (Trajectory.load(tmp_path / "run.npz"), Trajectory.from_bytes(run.to_bytes())):
        assert again.names == run.names and again.stop_reason == "steps"
        assert np.array_equal(again.steps, run.steps)
        for name in ("vector", "parts"):
            torch.testing.assert_close(again[name], run[name], rtol=0, atol=0)
        parts = {(0, 1): torch.zeros(2), "top": 3}
        again.append(30, {"loss": 0.0, "vector": torch.zeros(3), "parts": parts})
        assert len(again) == 4
    Trajectory().save(tmp_path / "empty.npz")
    assert len(Trajectory.load(tmp_path / "empty.npz")) == 0
    with np.load(tmp_path / "run.npz", allow_pickle=False) as file:
        assert {"steps", "loss", "parts/(0, 1)", "parts/top"} <= set(file.files)


def test_any_name_survives_a_file(tmp_path):
    run = Trajectory()
    values = {"file": 1.0, "allow_pickle": 2.0, "steps": 3.0, "about": 4.0, "err/test": 5.0}
    values |= {"err": {"test": 6.0, 1: 7.0, "1": 8.0}, "half": torch.tensor(0.5).bfloat16()}
    run.append(0, values)
    run.save(tmp_path / "run.npz")
    again = Trajectory.load(tmp_path / "run.npz")
    assert again.names == tuple(values) and again.steps.tolist() == [0]
    assert {k: v[0] for k, v in again["err"].items()} == values.pop("err")
    assert all(float(again[name][0]) == float(value) for name, value in values.items())


@pytest.mark.parametrize("value", [None, object(), [[1], [1, 2]], {"a": {"b": 1}}, {"a": None}])
def test_refuses_what_is_no_number(value):
    run = Trajectory()
    with pytest.raises(DataError, match="cannot be recorded"):
        run.append(0, {"x": value})
    assert len(run) == 0


def test_what_is_behind_a_mask_is_no_number():
    run = Trajectory()
    run.append(0, {"x": np.ma.array([1, 999], mask=[False, True]), "y": {"z": np.ma.masked}})
    assert run["x"][0, 0] == 1 and np.isnan([run["x"][0, 1], run["y"]["z"][0]]).all()


def test_refuses_changed_forms():
    run = example()
    good = {"loss": 1.0, "vector": torch.zeros(3), "parts": {(0, 1): torch.ones(2), "top": 1}}
    for changed in ({**good, "vector": torch.zeros(4)}, {**good, "more": 1.0}, {"loss": 1.0},
                    {**good, "parts": {(0, 1): torch.ones(2)}}):  # fmt: skip
        with pytest.raises(ShapeError, match="changed its form at step 30"):
            run.append(30, changed)
    assert len(run) == 3 and run["loss"].shape == (3,)
    message = "nothing named 'los' was observed; there is: loss, vector"
    with pytest.raises(OptionError, match=message):
        run["los"]


def test_refuses_files(tmp_path):
    np.savez(tmp_path / "run.npz", x=np.zeros(2))
    with pytest.raises(FileError, match="not a trajectory file"):
        Trajectory.load(tmp_path / "run.npz")
    with pytest.raises(FileError, match="no such trajectory file"):
        Trajectory.load(tmp_path / "none.npz")
