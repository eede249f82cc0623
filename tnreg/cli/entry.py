"""The entry point: which commands there are, how their options are read, how errors end."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import tyro

from tnreg.cli.doctor import doctor
from tnreg.cli.hints import hint
from tnreg.cli.look import rank, tree
from tnreg.cli.networks import export, probe
from tnreg.cli.show import plot
from tnreg.cli.shrink import decompose
from tnreg.cli.train import TOGETHER, demo, fit, run, sweep
from tnreg.errors import OptionError, TnregError
from tnreg.experiments import convac, dynamics, locality
from tnreg.experiments.dynamics import init_scale
from tnreg.experiments.sweep import kinds as sweep_kinds
from tnreg.machine.processes import ProcessLost, is_first, started


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``tnreg`` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Any] = {
        "demo": demo, "tree": tree, "rank": rank, "decompose": decompose, "fit": fit,
        "run": _run_with_defaults(given), "sweep": _sweep_with_defaults(given), "export": export,
        "probe": probe, "plot": plot, "doctor": doctor,
    }  # fmt: skip
    try:
        if given and given[0] != "run" and started() > 1:
            raise OptionError(f"torchrun started {started()} processes, which {TOGETHER}.")
        _check_completion(given)
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="tnreg",
            description="Tensor factorizations over mode trees: draw them, rank tensors, complete tensors.",
            args=given,
            config=(
                tyro.conf.OmitArgPrefixes,
                tyro.conf.OmitSubcommandPrefixes,
                tyro.conf.CascadeSubcommandArgs,
            ),
        )
    except TnregError as error:
        # all processes have the same error, but for the loss of one, which the first may be
        if isinstance(error, ProcessLost) or is_first():
            known = _options_of(commands, given)
            print(f"tnreg: {type(error).__name__}: {hint(str(error), known)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("tnreg: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _options_of(commands: dict[str, Any], given: Sequence[str]) -> set[str]:
    """Names of the options of the command that was given, and of the experiment after it."""
    command = commands.get(given[0]) if given else None
    if command is None:
        return set()
    parameters = inspect.signature(command).parameters.values()
    names = {one.name for one in parameters if one.kind is one.KEYWORD_ONLY}
    for one in parameters:  # the options of `fit` are fields
        if dataclasses.is_dataclass(one.default):
            names |= {field.name for field in dataclasses.fields(one.default)}
    for kind in get_args(command.__annotations__.get("experiment")):
        config, about = get_args(kind)
        if about.name == " ".join(given[1:2]):
            names |= {field.name for field in dataclasses.fields(config)}
    return names


def _check_completion(given: Sequence[str]) -> None:
    """Whether the script that completes commands in a shell can be made."""
    asked = [_named(given, f"--tyro-{verb}-completion") for verb in ("print", "write")]
    if "tcsh" in asked and importlib.util.find_spec("shtab") is None:
        raise OptionError(
            "completion for tcsh needs shtab, which is not installed; pip install shtab"
        )


def _run_with_defaults(given: Sequence[str]) -> Any:
    """The command ``run``; the preset that ``--model`` or ``--set`` names gives all other defaults."""
    preset = dynamics.MODELS.get(_named(given, "--model"), dynamics.htf)
    far = locality.SETS.get(_named(given, "--set"), locality.SETS["digits"])
    about = tyro.conf.subcommand("dynamics", default=preset, description="One training, watched.")
    sweep = tyro.conf.subcommand("init-scale", description="Trainings from several initial scales.")
    digits = tyro.conf.subcommand(
        "convac", description="Digits by networks of three trees, then shrunk."
    )
    seeing = tyro.conf.subcommand(
        "locality", default=far, description="Regularizers that make networks see far."
    )
    kinds = (
        Annotated[dynamics.Config, about]
        | Annotated[init_scale.Config, sweep]
        | Annotated[convac.Config, digits]
        | Annotated[locality.Config, seeing]
    )
    return _taking(run, kinds)


def _sweep_with_defaults(given: Sequence[str]) -> Any:
    """The command ``sweep``; default lists are those of the preset, as for ``run``."""
    kinds: Any = None
    for kind in sweep_kinds.KINDS.values():
        option = "--model" if kind.cell is dynamics.Config else "--set"
        made: Any = sweep_kinds.options(kind)
        start = made(**sweep_kinds.preset(kind, _named(given, option).split(",")[0]))
        about = tyro.conf.subcommand(kind.name, default=start, description=kind.about)
        one: Any = Annotated[made, about]
        kinds = one if kinds is None else kinds | one
    return _taking(sweep, kinds)


def _named(given: Sequence[str], option: str) -> str:
    """The last word that the command line gives for an option; empty if there is none."""
    words = [given[i + 1] for i, word in enumerate(given[:-1]) if word == option]
    words += [word.removeprefix(f"{option}=") for word in given if word.startswith(f"{option}=")]
    return words[-1] if words else ""


def _taking(command: Any, kinds: Any) -> Any:
    """A copy of a command whose experiment is one of ``kinds``."""
    code, around = command.__code__, command.__globals__
    copy = types.FunctionType(code, around, command.__name__, None, command.__closure__)
    copy.__kwdefaults__, copy.__doc__ = command.__kwdefaults__, command.__doc__
    copy.__annotations__ = {**command.__annotations__, "experiment": kinds}
    return copy
