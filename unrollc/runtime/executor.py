"""What runs a lowered program: its generated module, or the same with compiled functions."""

from __future__ import annotations

import warnings
from types import ModuleType

from unrollc.backends.bind import conforming
from unrollc.backends.inductor import Compilation
from unrollc.errors import BackendError
from unrollc.runtime.load import load
from unrollc.runtime.lowering import Lowered

#: What ``backend="auto"`` stands for.
AUTO = "aten"


class Executor:
    """A lowered program with what its backend makes of it.

    Attributes:
        lowered: The program.
        backend: Its backend, as the user named it.
    """

    def __init__(self, lowered: Lowered, backend: str) -> None:
        self.lowered = lowered
        self.backend = backend
        self._backend = AUTO if backend == "auto" else backend
        self._generated: ModuleType | None = None
        self._compiled: ModuleType | None = None
        self._compilation: Compilation | None = None

    def module(self) -> ModuleType:
        """What the next call runs, from its first step to the end of its backward pass.

        Compilation begins at the first call. With ``"inductor"`` this waits for its end, with
        ``"tiered"`` it is the generated module until then.

        Raises:
            BackendError: If Inductor cannot compile the program; with ``"tiered"`` that is a
                warning, and the generated module goes on.
        """
        if self._backend == "inductor":
            return self._when_compiled(wait=True) or self._as_generated()
        if self._backend == "tiered":
            try:
                return self._when_compiled(wait=False) or self._as_generated()
            except BackendError as error:
                self._backend = "aten"
                warnings.warn(f"the aten backend goes on: {error}", RuntimeWarning, stacklevel=4)
        return self._as_generated()

    def identity(self, module: ModuleType) -> str:
        """What tells runs by one module from runs by another, whose numbers round differently."""
        if module is not self._compiled:
            return ""
        assert self._compilation is not None
        return repr(sorted(self._compilation.keys.items()))

    def _as_generated(self) -> ModuleType:
        if self._generated is None:
            self._generated = load(self.lowered.generated)
        return self._generated

    def _when_compiled(self, *, wait: bool) -> ModuleType | None:
        if self._compiled is None:
            if self._compilation is None:
                self._compilation = Compilation(self.lowered.pieces)
            if not wait and not self._compilation.done():
                return None
            functions = self._compilation.functions()
            conform = conforming(self.lowered.pieces)
            self._compiled = load(self.lowered.generated, functions, conform)
        return self._compiled
