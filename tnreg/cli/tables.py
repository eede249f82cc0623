"""Tables of what experiments found."""

from __future__ import annotations

import math
from typing import Any

from rich.table import Table

from tnreg.cli.reply import short
from tnreg.experiments import dynamics, locality, sweep


def sweep_table(found: sweep.Result, name: str) -> Table:
    """Means over seeds."""
    if found.fields == locality.EXPERIMENT.fields:
        return locality_table(found.table, name)
    by = [field for field in found.fields if field != "seed"]
    out = Table(*by, title=name, title_justify="left")
    for head in ("seeds", found.headline):
        out.add_column(head, justify="right")
    for row in found.table:
        spread = "" if math.isnan(row["deviation"]) else f" ± {row['deviation']:.2g}"
        value = f"{row[found.headline]:.4g}{spread}"
        out.add_row(*(short(row[field]) for field in by), str(row["seeds"]), value)
    return out


def convac_tables(summary: dict[str, Any]) -> list[Table]:
    """Accuracies, and what is left of them when the classifiers are made smaller."""
    first = Table(
        "",
        title="digits, test accuracy: mean and standard deviation over seeds",
        title_justify="left",
    )
    for head in ("test", "train", "weights", "seconds", "equal in onnx"):
        first.add_column(head, justify="right")
    for name, (mean, spread) in summary["mean and spread"].items():
        rows = [row for row in summary["accuracy"] if row["model"] == name]
        equal = [row[key] for row in rows for key in row if key.startswith("equal")]
        first.add_row(
            name,
            f"{100 * mean:.1f} ± {100 * spread:.1f} %",
            f"{100 * sum(row['train'] for row in rows) / len(rows):.1f} %",
            str(rows[0]["weights"]),
            f"{sum(row['seconds'] for row in rows) / len(rows):.1f}",
            f"{100 * equal[0]:.0f} %" if equal else "",
        )
    second = Table("", "how", title="first seed, shrunk", title_justify="left")
    for head in ("asked", "error", "bound", "test", "weights", "largest bond"):
        second.add_column(head, justify="right")
    for row in summary["smaller"]:
        figures = [f"{row[key]:.3g}" for key in ("asked", "error", "bound")]
        figures += [f"{100 * row['test']:.1f} %", str(row["weights"]), str(row["largest bond"])]
        second.add_row(row["model"], row["how"], *figures)
    return [first, second]


def locality_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Accuracies against the distance, and what they cost."""
    out = Table("arm", title=f"{title}: test accuracy (%) of the last epoch", title_justify="left")
    for head in ("distance", "accuracy", "epochs", "seconds", "x plain", "an epoch"):
        out.add_column(head, justify="right")
    for row in rows:
        spread = "" if math.isnan(row["deviation"]) else f" ± {100 * row['deviation']:.1f}"
        figures = [f"{100 * row['test accuracy']:.1f}{spread}", f"{row['epochs']:.0f}"]
        figures += [f"{row['seconds']:.1f}"]
        figures += [
            "" if math.isnan(row[key]) else f"{row[key]:.2f}" for key in ("cost", "cost an epoch")
        ]
        out.add_row(row["arm"], str(row["distance"]), *figures)
    return out


def going_on_table(begun: list[dict[str, Any]]) -> Table:
    """Trainings that the same command goes on with."""
    title = "the time is over; the same command goes on with these, and with those not begun"
    out = Table("training", "epochs", "test accuracy", title=title, title_justify="left")
    for row in begun:
        out.add_row(row["name"], str(row["epochs"]), f"{100 * row['test accuracy']:.1f}")
    return out


def dynamics_table(summary: dict[str, Any], config: dynamics.Config) -> Table:
    """What one training found."""
    table = Table("", "", title=f"{config.model}, seed {config.seed}", show_header=False)
    for key, value in summary.items():
        if key == "components":
            value = "\n".join(f"{v}: {' '.join(f'{c:.3g}' for c in c)}" for v, c in value.items())
        elif key == "jumps":
            value = "\n".join(
                f"{v}: {', '.join(f'{a}-{b}' for a, b in sorted(c))}" for v, c in value.items()
            )
        elif isinstance(value, dict):
            value = ", ".join(f"{v}: {short(c)}" for v, c in value.items())
        elif isinstance(value, list):
            value = " ".join(map(short, value))
        table.add_row(key, short(value))
    return table


def init_scale_table(rows: list[dict[str, Any]], model: str) -> Table:
    """Trainings from several initial scales."""
    out = Table(*rows[0], title=f"{model} from several initial scales")
    for row in rows:
        out.add_row(*(short(value) for value in row.values()))
    return out
