"""Runs of a generated program from tapes: its forward pass, and its backward pass.

The tapes are recorded at the first run, from the functions `adapt` and `backward` of the generated
program itself; whatever schedule they follow is what the tapes follow. See `backends.tape`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unrollc.backends.bind import bound
from unrollc.backends.kernel import Kernel
from unrollc.backends.library import SAID, NativeCode, error_of
from unrollc.backends.player import ELSEWHERE
from unrollc.backends.tape import Given, Recorder, Symbol, Tape, UntapedError

#: Loads a generated module with other functions in the place of its own.
Load = Callable[[Mapping[str, Callable[..., Any]]], ModuleType]


class Memory(list[Tensor]):
    """The memory of a run, which its backward pass overwrites; a copy is other memory."""

    def copy(self) -> Memory:
        return Memory(each.clone() for each in self)


@dataclass(frozen=True)
class _Returned:
    """What a pass returns: a tree of outputs of its tape, inputs by label and row, and None."""

    leaves: tuple[int | tuple[str, int | None] | None, ...]
    tree: pytree.TreeSpec

    def built(self, outputs: list[Tensor], inputs: Mapping[str, Any]) -> Any:
        leaves = [
            outputs[leaf] if isinstance(leaf, int) else leaf and _input(inputs, *leaf)
            for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.tree)


@dataclass(frozen=True)
class Tapes:
    """The recorded passes of a program.

    Attributes:
        recorder: What has recorded them; it knows the arena, the sources and the functions.
        forward, adapted: The forward pass, and the loss, the last state and the inner losses.
        backward, gradients: The backward pass and the meta-gradients; None without one.
    """

    recorder: Recorder
    forward: Tape
    adapted: _Returned
    backward: Tape | None
    gradients: _Returned | None


def recorded(
    load: Load,
    kernels: Mapping[str, Kernel],
    codes: Mapping[str, NativeCode],
    inputs: Mapping[str, Any],
) -> Tapes:
    """The tapes of a program.

    Args:
        load: Loads its module.
        kernels: Its functions by name.
        codes: The machine code of those that compute anything.
        inputs: Of one run; others may be at other addresses.

    Raises:
        UntapedError: If the program does something that a tape cannot.
    """
    recorder = Recorder()
    module = load({name: _recording(recorder, kernels[name], codes.get(name)) for name in kernels})
    symbols = {label: recorder.input(label, value) for label, value in inputs.items()}
    *adapted, kept, cotangents, totals = module.adapt(symbols, 0)
    forward, returned = _cut(recorder, adapted)
    del adapted
    if not hasattr(module, "backward"):
        return Tapes(recorder, forward, returned, None, None)
    gradients = module.backward(symbols, 0, kept, cotangents, totals)
    del kept, cotangents, totals
    return Tapes(recorder, forward, returned, *_cut(recorder, gradients))


def _recording(recorder: Recorder, kernel: Kernel, code: NativeCode | None) -> Callable[..., Any]:
    symbols: Any = tuple(recorder.constant(each) for each in kernel.constants)
    if code is None:
        return bound(replace(kernel, constants=symbols), None)
    run: Any = recorder.function(code, len(kernel.inputs), kernel.outputs)
    return bound(replace(kernel, constants=symbols), run)


def _cut(recorder: Recorder, result: Any) -> tuple[Tape, _Returned]:
    """The tape up to a result."""
    leaves, tree = pytree.tree_flatten(result)
    outputs: list[Symbol] = []
    found: list[int | tuple[str, int | None] | None] = []
    for leaf in leaves:
        if leaf is None:
            found.append(None)
        elif isinstance(leaf, Given):
            found.append((leaf.label, leaf.row))
        elif isinstance(leaf, Symbol) and leaf.place < ELSEWHERE:
            found.append(len(outputs))
            outputs.append(leaf)
        else:
            raise UntapedError(f"a pass returns {leaf}")
    return recorder.cut(outputs), _Returned(tuple(found), tree)


# -- playing ----------------------------------------------------------------------------------


class Player:
    """The passes of a program, played from tapes where that is possible."""

    def __init__(
        self,
        load: Load,
        kernels: Mapping[str, Kernel],
        functions: Mapping[str, Callable[..., Any]],
        codes: Mapping[str, NativeCode],
        budget: int | None,
    ) -> None:
        """Record nothing yet.

        Args:
            load: Loads the program's module.
            kernels: Its functions by name.
            functions: What takes the place of the functions in the module.
            codes: The machine code of those that compute anything.
            budget: Bytes that the arena may have.
        """
        self._load, self._kernels, self._codes, self._budget = load, kernels, codes, budget
        self._module = load(functions)
        self._tapes: Tapes | None = None
        self._tried = False
        self._spares: list[Tensor] = []  # the memory of the run before, whose pages are warm

    def passes(self) -> dict[str, Callable[..., Any]]:
        """What takes the place of the module's own."""
        found: dict[str, Callable[..., Any]] = {"adapt": self._adapt}
        if hasattr(self._module, "backward"):
            found["backward"] = self._backward
        return found

    def _adapt(self, inputs: Mapping[str, Any], seed: int) -> Any:
        if not self._tried:
            self._tried = True
            self._tapes = self._recorded(inputs)
        if self._tapes is None:
            return self._module.adapt(inputs, seed)
        recorder = self._tapes.recorder
        try:
            arena = self._spares.pop()  # at once: another thread may run the same program
        except IndexError:
            arena = torch.empty(recorder.arena.nbytes + recorder.scratch, dtype=torch.uint8)
        outputs = self._run(self._tapes.forward, inputs, arena)
        kept = {}
        if self._tapes.backward is not None:
            kept[0] = Memory([arena])
        else:
            self._spares[:] = [arena]
        return (*self._tapes.adapted.built(outputs, inputs), kept, [], {})

    def _backward(
        self, inputs: Mapping[str, Any], seed: int, kept: Any, cotangents: Any, totals: Any
    ) -> Any:
        memory = kept.get(0)
        if not isinstance(memory, Memory):
            return self._module.backward(inputs, seed, kept, cotangents, totals)
        assert self._tapes is not None and self._tapes.backward is not None
        assert self._tapes.gradients is not None
        kept.clear()
        (arena,) = memory
        outputs = self._run(self._tapes.backward, inputs, arena)
        self._spares[:] = [arena]
        return self._tapes.gradients.built(outputs, inputs)

    def _recorded(self, inputs: Mapping[str, Any]) -> Tapes | None:
        try:
            tapes = recorded(self._load, self._kernels, self._codes, inputs)
        except UntapedError:
            return None
        fits = self._budget is None or tapes.recorder.arena.nbytes <= self._budget
        return tapes if fits else None

    def _run(self, tape: Tape, inputs: Mapping[str, Any], arena: Tensor) -> list[Tensor]:
        assert self._tapes is not None
        recorder = self._tapes.recorder
        outputs = [each.empty() for each in tape.outputs]
        bases = tape.addresses(inputs)
        bases += [each.data_ptr() for each in outputs]
        functions = (ctypes.c_int64 * len(recorder.functions))(*recorder.functions)
        play = next(iter(self._codes.values())).player
        addresses = (ctypes.c_void_p * len(bases))(*bases)
        begin = arena.data_ptr()
        memory = ctypes.c_void_p(begin), ctypes.c_void_p(begin + recorder.arena.nbytes)
        words = ctypes.c_void_p(tape.words.buffer_info()[0])
        said = ctypes.create_string_buffer(SAID)
        for first, last in zip(tape.marks, tape.marks[1:], strict=False):
            span = ctypes.c_int64(first), ctypes.c_int64(last)
            if play(words, *span, functions, *memory, addresses, said):
                raise error_of(said.value)
        return outputs


def _input(inputs: Mapping[str, Any], label: str, row: int | None) -> Tensor:
    value = inputs[label]
    found: Tensor = value if row is None else value[row]
    return found
