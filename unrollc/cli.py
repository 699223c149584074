"""The command line."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any

import typer

from unrollc import api

app = typer.Typer(add_completion=False, no_args_is_help=True)

_FACTORY = "module:factory; factory() returns model, opt, loss, train, val"


@app.callback()
def describe() -> None:
    """Exact meta-gradients through unrolled training, compiled."""


@app.command()
def check(factory: Annotated[str, typer.Argument(help=_FACTORY)]) -> None:
    """Say whether the meta-gradients exist; exit status 0 if all do, 1 if not."""
    try:
        requirements = api.check(*_load(factory))
    except api.UnrollcError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(str(requirements))
    raise typer.Exit(0 if requirements.ok else 1)


def _load(factory: str) -> tuple[Any, ...]:
    module_name, _, name = factory.partition(":")
    if not module_name or not name:
        raise api.InputError(f"{factory!r} is not of the form module:factory", remedy=_FACTORY)
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module_name), name)()
    except (ImportError, AttributeError) as error:
        raise api.InputError(f"{factory!r} cannot be loaded: {error}", remedy=_FACTORY) from error
    if not isinstance(made, tuple) or len(made) != 5:
        raise api.InputError(f"{factory!r} returned no tuple of five", remedy=_FACTORY)
    return made


def main() -> None:
    """Entry point of the ``unrollc`` command."""
    app()
