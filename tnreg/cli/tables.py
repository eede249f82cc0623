"""Tables of the results of experiments."""

import itertools
import math
from typing import Any

from rich.table import Table

from tnreg.cli.output import short, table_of
from tnreg.experiments import locality, sweep
from tnreg.experiments.dynamics import init_scale
from tnreg.machine.progress import plain_text


def sweep_tables(result: sweep.Result, name: str) -> list[Table]:
    """Return means over seeds; of locality what arms differ by as well."""
    if name == "locality" and result.table:
        return [
            locality_table(result.table, name), *paired_tables(locality.paired(result.rows, result.fields))
        ]  # fmt: skip
    fields = [field for field in result.fields if field != "seed"]
    rows = [
        {**{field: short(row[field]) for field in fields}, "seeds": row["seeds"],
         result.headline: _mean(row[result.headline], row["deviation"], ".4g", ".2g")}
        for row in result.table
    ]  # fmt: skip
    columns = (*fields, "seeds", result.headline)
    caption = init_scale.on_plateau(result.rows)
    return [table_of(rows, columns, len(fields), title=name, caption=caption)]


def locality_table(means: list[dict[str, Any]], title: str) -> Table:
    """Return accuracies against the distance and all else that varies, and what they cost."""
    rows = []
    for row in means:
        accuracy = _mean(100 * row["test accuracy"], 100 * row["deviation"], ".1f", ".1f")
        some = ("cost", "cost an epoch", "images")
        costs = {key: "" if math.isnan(row[key]) else f"{row[key]:.2f}" for key in some}
        rows.append({**row, **costs, "accuracy": accuracy})
    columns = {**_fields(means), "accuracy": "{accuracy}", "epochs": "{epochs:.0f}",
               "x plain": "{cost}", "a step": "{cost an epoch}", "images": "{images}"}  # fmt: skip
    return table_of(rows, columns, title=f"{title}: test accuracy (%) of the last epoch")


def paired_tables(pairs: list[dict[str, Any]]) -> list[Table]:
    """Return what arms differ by on the same seeds; nothing if none has two."""
    rows = [
        {**row, "difference": _mean(100 * row["difference"], 100 * row["deviation"], "+.1f", ".1f"),
         "t": "" if math.isnan(row["t"]) else f"{row['t']:.1f}"}
        for row in pairs if row["seeds"] > 1
    ]  # fmt: skip
    if not rows:
        return []
    columns = {**_fields(rows), "seeds": "{seeds}", "difference": "{difference}", "t": "{t}"}
    return [table_of(rows, columns, title="arm minus arm on the same seeds, points")]


def _fields(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Return columns for what rows are about."""
    return {name: f"{{{name}}}" for name in itertools.takewhile(lambda key: key != "seeds", rows[0])}


def unfinished_table(trainings: list[dict[str, Any]]) -> Table:
    """Return the trainings that the same command continues."""
    rows = [{**row, "accuracy": 100 * row["test accuracy"]} for row in trainings]
    columns = {"training": "{name}", "epochs": "{epochs}", "test accuracy": "{accuracy:.1f}"}
    title = "the time is over; the same command goes on with these, and with those not begun"
    return table_of(rows, columns, len(columns), title=title)


def convac_tables(summary: dict[str, Any]) -> list[Table]:
    """Return the accuracies of classifiers, and those after the classifiers are made smaller."""
    means = []
    for name, (mean, deviation) in summary["mean and spread"].items():
        rows = [row for row in summary["accuracy"] if row["model"] == name]
        train, seconds = (sum(row[key] for row in rows) / len(rows) for key in ("train", "seconds"))
        equal = [100 * row[key] for row in rows for key in row if key.startswith("equal")]
        means.append(
            {"model": name, "mean": 100 * mean, "deviation": 100 * deviation, "train": 100 * train,
             "seconds": seconds, "weights": rows[0]["weights"],
             "equal": f"{equal[0]:.0f} %" if equal else ""}
        )  # fmt: skip
    heads = {
        "": "{model}", "test": "{mean:.1f} ± {deviation:.1f} %", "train": "{train:.1f} %",
        "weights": "{weights}", "seconds": "{seconds:.1f}", "equal in onnx": "{equal}",
    }  # fmt: skip
    columns = {
        "": "{model}", "how": "{how}", "asked": "{asked:.3g}", "error": "{error:.3g}",
        "bound": "{bound:.3g}", "test": "{accuracy:.1f} %", "weights": "{weights}",
        "largest bond": "{largest bond}",
    }  # fmt: skip
    smaller = [{**row, "accuracy": 100 * row["test"]} for row in summary["smaller"]]
    title = "digits, test accuracy: mean and standard deviation over seeds"
    return [
        table_of(means, heads, title=title),
        table_of(smaller, columns, left=2, title="first seed, shrunk"),
    ]


def summary_table(summary: dict[str, Any], title: str) -> Table:
    """Return what one training found, a line for each value."""
    table = Table("", "", title=plain_text(title), show_header=False)
    for key, value in summary.items():
        if key == "components":
            value = "\n".join(f"{v}: {' '.join(f'{c:.3g}' for c in c)}" for v, c in value.items())
        elif key == "jumps":
            value = "\n".join(f"{v}: {', '.join(f'{a}-{b}' for a, b in sorted(c))}" for v, c in value.items())
        elif isinstance(value, dict):
            value = ", ".join(f"{v}: {short(c)}" for v, c in value.items())
        elif isinstance(value, list):
            value = " ".join(map(short, value))
        table.add_row(plain_text(key), plain_text(short(value)))
    return table


def init_scale_table(rows: list[dict[str, Any]], model: str) -> Table:
    """Return the results of trainings from several initial scales."""
    cells = [{key: short(value) for key, value in row.items()} for row in rows]
    title = f"{model} from several initial scales"
    return table_of(cells, tuple(rows[0]), len(rows[0]), title=title, title_justify="center",
                    caption=init_scale.on_plateau(rows))  # fmt: skip


def _mean(mean: float, deviation: float, form: str, form_of_deviation: str) -> str:
    spread = "" if math.isnan(deviation) else f" ± {deviation:{form_of_deviation}}"
    return f"{mean:{form}}{spread}"
