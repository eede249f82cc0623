"""The entry point: which commands there are, how their options are read, how errors are reported."""

import argparse
import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Callable, Collection, Sequence
from types import NoneType
from typing import Any, get_args

import tyro
from tyro import conf
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tnreg.errors import OptionError, TnregError, did_you_mean
from tnreg.machine.progress import printable
from tnreg.machine.versions import __version__

# Commands: the file that each is in, loaded when it is called for, and its line in the help of all.
COMMANDS = {
    "demo": ("fit_demo", "Complete a measured tensor, learn another component by component, write a report."),
    "complete": (
        "complete",
        "Fill the gaps of a tensor from all entries that are known: ranks, tree and the error are found.",
    ),
    "tree": ("tree", "Draw a mode tree, or find one for a tensor."),
    "rank": ("rank", "Print the hierarchical ranks, effective ranks and entropies of a tensor along a tree."),
    "decompose": (
        "decompose",
        "Hierarchical SVD of a tensor along a tree, or rounding of a saved model, to a relative error.",
    ),
    "fit": (
        "fit_demo",
        "Train a factorization along a tree on a part of a tensor's entries, by gradients, to study that.",
    ),
    "run": ("run_sweep", "Run an experiment of the paper, or the same on a tree and a target of your own."),
    "sweep": (
        "run_sweep",
        "Run an experiment over lists of settings, on this machine's processors or on a Dask cluster.",
    ),
    "export": (
        "export_probe",
        "Write a saved model as a convolutional network, for programs without tnreg.",
    ),
    "probe": (
        "export_probe",
        "Measure which patches trained networks tie together: interaction against distance.",
    ),
    "plot": ("plot", "Draw what a run recorded; several runs of `dynamics` side by side."),
    "doctor": ("doctor", "List needed packages and devices."),
}  # fmt: skip

# Arguments of the library whose options have another name.
_OPTIONS = {"folder": "out", "sizes": "tree", "grid": "map"}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the ``tnreg`` command; exit codes are those of ``tnreg.cli``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = words[0] if words else ""
    if first == "--version":
        print(f"tnreg {__version__}")
        return
    if first not in COMMANDS and not first.startswith("-") and first:
        text = f"tnreg: there is no command {first!r}.\n{did_you_mean(first, COMMANDS)}"
        print(f"{text}  commands: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    completion = any(word.startswith("--tyro") for word in words)  # of all commands, for a shell
    try:
        tyro.extras.subcommand_cli_from_dict(
            {name: _load(name, words) if completion or name == first else _named(name) for name in COMMANDS},
            prog="tnreg",
            description="Tensor factorizations over mode trees: draw them, rank tensors, complete tensors. "
            "tnreg COMMAND --help explains a command, tnreg --version prints the version.",
            args=words,
            registry=_readers(),
            config=(conf.OmitArgPrefixes, conf.OmitSubcommandPrefixes, conf.CascadeSubcommandArgs),
        )
    except ImportError as error:
        if "shtab" not in str(error):
            raise
        _exit(OptionError("completion for tcsh needs shtab; pip install shtab"), ())
    except KeyboardInterrupt:
        kept = words[:1] in (["run"], ["sweep"])
        more = "; the same command goes on where this one stopped" if kept else ""
        if _is_first():
            print(f"tnreg: interrupted{more}", file=sys.stderr)
        raise SystemExit(130) from None


def _load(name: str, words: Sequence[str]) -> Callable[..., None]:
    """Return a command."""
    module: Any = importlib.import_module(f"tnreg.cli.{COMMANDS[name][0]}")
    if name not in ("run", "sweep"):
        return _report_errors(getattr(module, name))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--model", "--set"):  # presets; defaults of other options come from them
        parser.add_argument(option, nargs="?", default="", const="")
    presets = vars(parser.parse_known_args(words)[0]).values()
    return _report_errors((module.make_run if name == "run" else module.make_sweep)(*presets))


def _named(name: str) -> Callable[[], None]:
    """Return what stands for a command in the help of all."""

    def command() -> None: ...

    command.__doc__ = COMMANDS[name][1]
    return command


def _readers() -> ConstructorRegistry:
    """Return how options are read that may be left out: as the others, so that help shows one type."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        kinds = [kind for kind in get_args(info.type) if kind is not NoneType]
        if len(kinds) != 1 or NoneType not in get_args(info.type):
            return None
        spec: Any = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kinds[0], info.markers))
        if not isinstance(spec, PrimitiveConstructorSpec):
            return None
        return dataclasses.replace(
            spec,
            instance_from_str=lambda words: None if words == ["None"] else spec.instance_from_str(words),
            is_instance=lambda value: value is None or spec.is_instance(value),
            str_from_instance=lambda value: ["None"] if value is None else spec.str_from_instance(value),
        )

    return registry


def _report_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command, ending with exit code 1 and one message if there is an error."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        values = (*arguments, *options.values())
        try:
            if "WORLD_SIZE" in os.environ:
                _check_processes(values)
            command(*arguments, **options)
        except TnregError as error:
            groups = filter(dataclasses.is_dataclass, values)  # their fields are options
            fields = {field.name for group in groups for field in dataclasses.fields(group)}
            _exit(error, {*options, *fields})

    return run


def _check_processes(values: Sequence[Any]) -> None:
    from tnreg.experiments import locality
    from tnreg.machine.processes import started

    if started() > 1 and not any(isinstance(value, locality.Config) for value in values):
        raise OptionError(
            f"torchrun started {started()} processes, which work together in `tnreg run locality` "
            "alone; give other commands without torchrun."
        )


def _is_first() -> bool:
    """Return whether this process is to print, without torch where torchrun did not start it."""
    return "WORLD_SIZE" not in os.environ or importlib.import_module("tnreg.machine.processes").is_first()


def _exit(error: TnregError, options: Collection[str]) -> None:
    """Print the error, with the option that it is about, and end with exit code 1."""
    # all processes have the same error, except when one is lost, which may be the first
    if type(error).__name__ == "ProcessLost" or _is_first():
        message, name = str(error), error.argument or ""
        names = (name, f"{name}s", name.removesuffix("s"), _OPTIONS.get(name, ""))
        option = next((option for option in names if option in options), "")
        flag = f"--{option.replace('_', '-')}"
        if option and flag not in message:
            message += f"\n  option: {flag}"
        print(printable(f"tnreg: {type(error).__name__}: {message}", keep="\n"), file=sys.stderr)
    raise SystemExit(1) from None
