"""What runs a lowered program: its generated module, or the same with compiled functions."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

from unrollc.backends.bind import Function, conforming
from unrollc.backends.inductor import Compilation
from unrollc.errors import BackendError
from unrollc.plan.threads import all_small
from unrollc.runtime.allocator import keep_freed_memory
from unrollc.runtime.load import load
from unrollc.runtime.lowering import Lowered
from unrollc.runtime.products import faster_products
from unrollc.runtime.taped import Player

#: What ``backend="auto"`` stands for.
AUTO = "aten"


class Executor:
    """A lowered program with what its backend makes of it.

    Attributes:
        lowered: The program.
        backend: Its backend, as the user named it.
    """

    def __init__(self, lowered: Lowered, backend: str, *, steady: bool = False) -> None:
        """Compile nothing yet.

        Args:
            lowered: The program.
            backend: As given to `compile`.
            steady: Whether all calls must run the same code, so that one waits for all of it.
        """
        self.lowered = lowered
        self.backend = backend
        self._backend = AUTO if backend == "auto" else backend
        self._steady = steady
        self._threads = 1 if all_small(lowered.pieces) else None
        self._generated: ModuleType | None = None
        self._compiled: ModuleType | None = None
        self._identity = ""
        self._compilation: Compilation | None = None

    def module(self) -> ModuleType:
        """What the next call runs, from its first step to the end of its backward pass.

        Compilation begins at the first call. With ``"inductor"`` this waits for the functions that
        take most of the time, with ``"tiered"`` it is the generated module until they are there.

        Raises:
            BackendError: If Inductor cannot compile the program; with ``"tiered"`` that is a
                warning, and the generated module goes on.
        """
        plan = self.lowered.plan
        if plan.budget is None and self.lowered.pieces.device.type == "cpu":
            keep_freed_memory(plan.peak_bytes)
        if self._backend == "inductor":
            return self._as_compiled()
        if self._backend == "tiered":
            try:
                if self._begun().ready():
                    return self._as_compiled()
            except BackendError as error:
                self._backend = "aten"
                warnings.warn(f"the aten backend goes on: {error}", RuntimeWarning, stacklevel=4)
        return self._as_generated()

    def identity(self, module: ModuleType) -> str:
        """What tells runs by one module from runs by another, whose numbers round differently."""
        return self._identity if module is self._compiled else ""

    def finish_compiling(self) -> None:
        """Wait until nothing more is being compiled.

        Raises:
            BackendError: If Inductor cannot compile a function.
        """
        if self._compilation is not None and self._backend != "aten":
            self._compilation.functions(everything=True)

    def _as_generated(self) -> ModuleType:
        if self._generated is None:
            self._generated = load(self.lowered.generated, faster_products(), threads=self._threads)
        return self._generated

    def _begun(self) -> Compilation:
        if self._compilation is None:
            self._compilation = Compilation(self.lowered.pieces)
        return self._compilation

    def _as_compiled(self) -> ModuleType:
        """The module with all functions that are compiled by now."""
        compilation = self._begun()
        compiled = compilation.functions(everything=self._steady)
        keys = {name: key for name, key in compilation.keys.items() if name in compiled}
        identity = repr(sorted(keys.items()))
        if self._compiled is None or identity != self._identity:
            ops = self._as_generated()
            functions = {
                name: compiled[name] if name in compiled else compilation.arranged(name, op)
                for name, op in self._named(ops)
            }
            codes = None if self._steady else compilation.codes()
            if codes is not None:
                generated = functools.partial(load, self.lowered.generated)
                budget = self.lowered.plan.budget
                player = Player(generated, compilation.kernels, functions, codes, budget)
                functions |= player.passes()
            conform = conforming(self.lowered.pieces)
            self._compiled = load(self.lowered.generated, functions, conform, self._threads)
            self._identity = identity
        return self._compiled

    def _named(self, module: ModuleType) -> list[tuple[str, Function]]:
        """The functions of a module that have a graph."""
        return [(name, getattr(module, name)) for name, _ in self.lowered.pieces.named_graphs]
