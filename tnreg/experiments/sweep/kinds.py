"""What the command line sweeps: trainings of ``locality`` and runs of ``dynamics``.

The options of a sweep are the settings of one cell, each a list of values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from tnreg.experiments import dynamics, locality
from tnreg.experiments.sweep import command as sweep_grid
from tnreg.experiments.sweep.experiment import Experiment


def _work(cell: dict[str, Any], folder: Path, checkpoint: Path) -> dict[str, Any]:
    """One run of ``dynamics``; lists of JSON are tuples again."""
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in cell.items()
    }
    config = dynamics.Config(**given)
    return dynamics.run(config, folder, pictures=False, checkpoint=checkpoint)


def _row(cell: dict[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    more = {name: summary[name] for name in ("train error", "stopped by", "seconds")}
    return {**dynamics.row(summary), **more}


DYNAMICS = Experiment(
    _work, title="dynamics_sweep", fields=("seed",), row=_row, headline="test error",
    defaults=dataclasses.asdict(dynamics.Config()),
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """An experiment that the command line sweeps.

    Attributes:
        name: Of its command.
        experiment: What is swept.
        cell: Dataclass of one cell.
        about: Its help in one line.
        check: Raises an error for settings of a cell that cannot be.
    """

    name: str
    experiment: Experiment
    cell: type
    about: str
    check: Callable[[Mapping[str, Any]], Any] | None = None


_LOCALITY = Kind(
    "locality", locality.EXPERIMENT, locality.Training, "Regularizers that make networks see far.",
    locality.check,
)  # fmt: skip
_DYNAMICS = Kind("dynamics", DYNAMICS, dynamics.Config, "Components learned one after another.")
KINDS = {kind.name: kind for kind in (_LOCALITY, _DYNAMICS)}


def cells(grid: Any) -> tuple[Kind, list[dict[str, Any]]]:
    """What is swept, and all combinations of the lists of ``grid``; seeds change slowest."""
    kind = next(kind for kind in KINDS.values() if isinstance(grid, kind.cell))
    found = sweep_grid.cells(grid, kind.cell)
    if kind.check is not None:
        for cell in found:
            kind.check(cell)
    return kind, found


def options(kind: Kind) -> type:
    """The dataclass of one cell with a list of values for every scalar field, for tyro to read."""
    fields: list[tuple[str, Any, Any]] = [
        (name, Annotated[tuple, _list_of(one, name)], dataclasses.field(default=()))
        for name, one in sweep_grid.scalars(kind.cell).items()
    ]
    return dataclasses.make_dataclass(
        f"Sweep{kind.cell.__name__}", fields, bases=(kind.cell,), frozen=True
    )


def preset(kind: Kind, name: str) -> dict[str, Any]:
    """Default lists of values, those of a preset of ``run``."""
    if kind.cell is dynamics.Config:
        base = dynamics.MODELS.get(name, dynamics.htf)
        values = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
        lists = {}
    else:
        far = locality.SETS.get(name, locality.SETS["digits"])
        lists = {"arm": far.arms, "distance": far.distances, "seed": far.seeds}
        names = [f.name for f in dataclasses.fields(locality.Training)]
        values = {name: getattr(far, name) for name in names if name not in lists}
    scalar = sweep_grid.scalars(kind.cell)
    return {**{n: (v,) if n in scalar else v for n, v in values.items()}, **lists}


def _list_of(kind: Any, name: str) -> PrimitiveConstructorSpec[tuple[Any, ...]]:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=sweep_grid.shape(kind),
        instance_from_str=lambda words: sweep_grid.parse(words[0], kind, name),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda values: [sweep_grid.written(values)],
    )
