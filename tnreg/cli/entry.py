"""The entry point: which commands there are, how their options are read, how errors are reported."""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import tyro
from tyro import conf

from tnreg.cli.decompose import decompose
from tnreg.cli.doctor import doctor
from tnreg.cli.export_probe import export, probe
from tnreg.cli.fit_demo import demo, fit
from tnreg.cli.plot import plot
from tnreg.cli.run_sweep import make_run, make_sweep
from tnreg.cli.tree_rank import rank, tree
from tnreg.errors import OptionError, TnregError
from tnreg.experiments import locality
from tnreg.machine.processes import ProcessLost, is_first, started
from tnreg.machine.progress import printable

# Arguments of the library whose options have another name.
_OPTIONS = {"folder": "out", "sizes": "tree"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``tnreg`` command; exit codes are those of ``tnreg.cli``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model", "--set"):  # presets; defaults of other options come from them
        parser.add_argument(option, nargs="?", default="", const="")
    presets = vars(parser.parse_known_args(words)[0]).values()
    run, sweep = make_run(*presets), make_sweep(*presets)
    commands = (demo, tree, rank, decompose, fit, run, sweep, export, probe, plot, doctor)
    try:
        tyro.extras.subcommand_cli_from_dict(
            {command.__name__: _report_errors(command) for command in commands},
            prog="tnreg",
            description="Tensor factorizations over mode trees: draw them, rank tensors, complete tensors.",
            args=words,
            config=(conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.CascadeSubcommandArgs),
        )
    except ImportError as error:
        if "shtab" not in str(error):
            raise
        _exit(OptionError("completion for tcsh needs shtab; pip install shtab"), ())
    except KeyboardInterrupt:
        kept = words[:1] in (["run"], ["sweep"])
        more = "; the same command goes on where this one stopped" if kept else ""
        if is_first():
            print(f"tnreg: interrupted{more}", file=sys.stderr)
        raise SystemExit(130) from None


def _report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, ending with exit code 1 and one message if there is an error."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        values = (*arguments, *options.values())
        try:
            if started() > 1 and not any(isinstance(value, locality.Config) for value in values):
                raise OptionError(
                    f"torchrun started {started()} processes, which work together in `tnreg run locality` "
                    "alone; give other commands without torchrun."
                )
            command(*arguments, **options)
        except TnregError as error:
            groups = filter(dataclasses.is_dataclass, values)  # their fields are options
            fields = {field.name for group in groups for field in dataclasses.fields(group)}
            _exit(error, {*options, *fields})

    return run


def _exit(error: TnregError, options: Collection[str]) -> None:
    """Print the error, with the option that it is about, and end with exit code 1."""
    # all processes have the same error, except when one is lost, which may be the first
    if isinstance(error, ProcessLost) or is_first():
        message, name = str(error), error.argument or ""
        names = (name, f"{name}s", name.removesuffix("s"), _OPTIONS.get(name, ""))
        option = next((option for option in names if option in options), "")
        flag = f"--{option.replace('_', '-')}"
        if option and flag not in message:
            message += f"\n  option: {flag}"
        print(printable(f"tnreg: {type(error).__name__}: {message}", keep="\n"), file=sys.stderr)
    raise SystemExit(1) from None
