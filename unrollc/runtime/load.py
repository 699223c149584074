"""Generated source as a live module that a debugger can step through."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Mapping
from types import CodeType, ModuleType
from typing import Any

import torch

from unrollc.codegen.module import GeneratedCode

#: Functions that a run enters a program by; their first argument is the program's inputs.
_ENTRIES = ("prepare", "start", "forward", "finish", "reverse", "adapt", "backward", "conclude")


def load(
    generated: GeneratedCode,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    conform: Callable[[Any], Any] | None = None,
    threads: int | None = None,
) -> ModuleType:
    """Execute generated source; its lines are registered with `linecache`.

    Args:
        generated: The source.
        functions: What takes the place of functions of the same names.
        conform: Goes over the inputs wherever a run enters the program.
        threads: Most threads of torch's that a run uses; None for all.
    """
    digest = hashlib.sha256(generated.text.encode()).hexdigest()[:12]
    file = f"<unrollc {digest}>"
    lines = generated.text.splitlines(keepends=True)
    linecache.cache[file] = (len(generated.text), None, lines, file)
    module = ModuleType(f"unrollc_program_{digest}")
    module.__file__ = file
    exec(_code(generated.text, file), module.__dict__)
    module.__dict__.update(functions or {})
    for name in _ENTRIES:
        if hasattr(module, name):
            entry = getattr(module, name)
            entry = entry if conform is None else _conformed(entry, conform)
            setattr(module, name, entry if threads is None else _limited(entry, threads))
    return module


@functools.lru_cache(maxsize=8)  # a compiled program is loaded several times in a row
def _code(text: str, file: str) -> CodeType:
    return compile(text, file, "exec")


def _conformed(function: Callable[..., Any], conform: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def entry(inputs: Any, *args: Any) -> Any:
        return function(conform(inputs), *args)

    return entry


def _limited(function: Callable[..., Any], threads: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def entry(*args: Any) -> Any:
        before = torch.get_num_threads()
        if before <= threads:
            return function(*args)
        torch.set_num_threads(threads)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(before)

    return entry
