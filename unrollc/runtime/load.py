"""Generated source as a live module that a debugger can step through."""

from __future__ import annotations

import hashlib
import linecache
from types import ModuleType

from unrollc.codegen.module import GeneratedCode


def load(generated: GeneratedCode) -> ModuleType:
    """Execute generated source; its lines are registered with `linecache`."""
    digest = hashlib.sha256(generated.text.encode()).hexdigest()[:12]
    file = f"<unrollc {digest}>"
    lines = generated.text.splitlines(keepends=True)
    linecache.cache[file] = (len(generated.text), None, lines, file)
    module = ModuleType(f"unrollc_program_{digest}")
    module.__file__ = file
    exec(compile(generated.text, file, "exec"), module.__dict__)
    return module
