"""Generated source as a live module that a debugger can step through."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from unrollc.codegen.module import GeneratedCode

#: Functions that a run enters a program by; their first argument is the program's inputs.
_ENTRIES = ("start", "forward", "finish", "reverse", "adapt", "backward")


def load(
    generated: GeneratedCode,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    conform: Callable[[Any], Any] | None = None,
) -> ModuleType:
    """Execute generated source; its lines are registered with `linecache`.

    Args:
        generated: The source.
        functions: What takes the place of functions of the same names.
        conform: Goes over the inputs wherever a run enters the program.
    """
    digest = hashlib.sha256(generated.text.encode()).hexdigest()[:12]
    file = f"<unrollc {digest}>"
    lines = generated.text.splitlines(keepends=True)
    linecache.cache[file] = (len(generated.text), None, lines, file)
    module = ModuleType(f"unrollc_program_{digest}")
    module.__file__ = file
    exec(compile(generated.text, file, "exec"), module.__dict__)
    module.__dict__.update(functions or {})
    if conform is not None:
        for name in _ENTRIES:
            if hasattr(module, name):
                setattr(module, name, _entered(getattr(module, name), conform))
    return module


def _entered(function: Callable[..., Any], conform: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def entry(inputs: Any, *args: Any) -> Any:
        return function(conform(inputs), *args)

    return entry
