"""The command line."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Annotated, Any

import torch
import typer

from unrollc import api
from unrollc.plan import calibration

app = typer.Typer(add_completion=False, no_args_is_help=True)

_FACTORY = (
    "module:factory; factory() returns model, opt, loss, train, val and, if need be, a dictionary "
    "of further arguments of compile (val_loss, meta, gradient)"
)


@app.callback()
def describe() -> None:
    """Exact meta-gradients through unrolled training, compiled."""


@app.command()
def check(
    factory: Annotated[str, typer.Argument(help=_FACTORY)],
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
    derivations: Annotated[
        bool, typer.Option("--derivations", help="Add the derivatives of the update.")
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Write them in LaTeX.")] = False,
) -> None:
    """Say whether the meta-gradients exist; exit status 0 if all do, 1 if not.

    Exit status 2 means that the program cannot be loaded or captured.
    """
    try:
        *problem, options = _load(factory)
        requirements = api.check(*problem, **options)
    except api.UnrollcError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error
    found = requirements.derivations if derivations or latex else ()
    texts = [each.latex if latex else each.text for each in found]
    if as_json:
        data: dict[str, Any] = {"ok": requirements.ok, "verdicts": requirements.to_dict()}
        typer.echo(json.dumps({**data, **({"derivations": texts} if texts else {})}, indent=2))
    else:
        typer.echo("\n\n".join([str(requirements), *texts]))
    raise typer.Exit(0 if requirements.ok else 1)


@app.command()
def calibrate() -> None:
    """Measure what this machine takes for an operation, a byte and a call.

    The result goes to the user's cache directory; compilations that use as many threads choose
    between modes, and between keeping and recomputing, by it.
    """
    rates, rows = calibration.measure()
    for row in rows:
        typer.echo(str(row))
    path = calibration.save(rates)
    typer.echo(f"{rates}\nin {torch.get_num_threads()} threads; written to {path}")


def _load(factory: str) -> tuple[Any, ...]:
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise api.InputError(f"{factory!r} is not of the form module:factory", remedy=_FACTORY)
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module_name), name)()
    except Exception as error:  # the user's code may raise anything
        what = f"{factory!r} cannot be loaded: {type(error).__name__}: {error}"
        raise api.InputError(what, remedy=_FACTORY) from error
    if not isinstance(made, tuple | list) or len(made) not in (5, 6):
        raise api.InputError(f"{factory!r} returned no tuple of five or six", remedy=_FACTORY)
    options = made[5] if len(made) == 6 else {}
    if not isinstance(options, dict):
        raise api.InputError(f"the sixth value of {factory!r} is no dictionary", remedy=_FACTORY)
    return (*made[:5], options)


def main() -> None:
    """Entry point of the ``unrollc`` command."""
    app()
