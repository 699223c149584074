"""A whole schedule as one list of calls of machine code, in memory that is planned ahead.

The generated program is run once on symbols in the place of tensors::

    state, losses[j] = step_1(state, inputs["lr"], inputs["train"][j])    -->
    step_1: arena+0, arena+512, lr, train[j] -> arena+1024, arena+1536
    copy 4 bytes: losses+4j <- arena+1536

What the symbols go through is the tape: which functions run, in which order, on which addresses.
Symbols die as tensors would, so each value's memory is known to be free again, and every value has
its place in one arena before anything runs. Playing the tape needs neither Python nor an allocator
between two calls, and gives the numbers of the program itself bit by bit: the same functions run in
the same order.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from unrollc.backends.kernel import Spec
from unrollc.backends.library import NativeCode
from unrollc.backends.native import ALIGNED
from unrollc.backends.player import ELSEWHERE, FUNCTIONS, Opcode


class UntapedError(Exception):
    """A program does something that cannot be put on a tape."""


@dataclass(frozen=True)
class Source:
    """Memory outside of the arena, one address or several in a row.

    Attributes:
        label: Of the input; None for a constant.
        rows: How many rows of the input, or tensors of a list, have an address each; None where
            it has one as a whole.
        constant: The tensor that belongs to a function of the program.
        first: The number of the first address.
    """

    label: str | None
    rows: int | None
    constant: Tensor | None
    first: int


class Symbol:
    """Stands for a tensor while a tape is recorded.

    Attributes:
        spec: What is fixed of the tensor.
        place: The word of the tape that says where its memory begins.
        offset: Bytes from there to its first element.
    """

    def __init__(
        self, recorder: Recorder, spec: Spec, place: int, offset: int = 0, of: Symbol | None = None
    ) -> None:
        self.spec, self.place, self.offset = spec, place, offset
        self._recorder = recorder
        self._of = of  # the tensor that it is a part of, whose memory it keeps

    def __del__(self) -> None:
        if self.place < ELSEWHERE and self._of is None:
            self._recorder.arena.free(self.place * ALIGNED)

    # -- what a generated program does with tensors ---------------------------------------------

    def stride(self) -> tuple[int, ...]:
        return self.spec.stride

    def new_empty(self, shape: int | Sequence[int], *, dtype: torch.dtype) -> Symbol:
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        like = torch.empty(sizes, dtype=dtype, device="meta")
        return self._recorder.new(Spec(sizes, like.stride(), str(dtype), self.spec.device))

    def __getitem__(self, row: Any) -> Symbol:
        spec = self.spec
        if not isinstance(row, int) or not spec.shape or not 0 <= row < spec.shape[0]:
            raise UntapedError(f"[{row}] has no place on a tape")
        part = Spec(spec.shape[1:], spec.stride[1:], spec.dtype, spec.device)
        step = spec.stride[0] * _itemsize(spec.dtype)
        return Symbol(self._recorder, part, self.place, self.offset + row * step, self)

    def __setitem__(self, row: int, value: Symbol) -> None:
        self._recorder.copy(self[row], value)

    def add_(self, other: Symbol) -> Symbol:
        self._recorder.add(self, other)
        return self

    def __add__(self, other: Symbol) -> Symbol:
        total = self._recorder.new(self.spec)
        self._recorder.copy(total, self)
        return total.add_(other)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Symbol:
        if function is not torch.zeros_like or kwargs or len(args) != 1:
            raise UntapedError(f"{function} has no place on a tape")
        (like,) = args
        recorder: Recorder = like._recorder
        zeros = recorder.new(like.spec)
        recorder.zero(zeros)
        return zeros

    def __getattr__(self, name: str) -> Any:
        raise UntapedError(f"Tensor.{name} has no place on a tape")


def _untaped(name: str) -> Callable[..., Any]:
    def method(self: Symbol, *args: Any) -> Any:
        raise UntapedError(f"{name} has no place on a tape")

    return method


for _name in ("radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "iter", "len", "bool"):
    setattr(Symbol, f"__{_name}__", _untaped(_name))


class Given(Symbol):
    """Stands for an input, or for a row of one.

    Attributes:
        label: The input's.
        row: Which row, or which tensor of a list; None for all of it.
    """

    def __init__(
        self, recorder: Recorder, like: Tensor, place: int, label: str, row: int | None
    ) -> None:
        super().__init__(recorder, spec_of(like), place)
        self.label, self.row = label, row
        self._like = like

    def __getitem__(self, row: int) -> Symbol:
        if self.row is not None:
            raise UntapedError("a row of a row")
        return self._recorder.row(self.label, self._like, row)


class GivenList:
    """Stands for an input that is a list of tensors."""

    def __init__(self, recorder: Recorder, label: str, like: Sequence[Tensor]) -> None:
        self._recorder, self._label, self._like = recorder, label, like

    def __getitem__(self, row: int) -> Symbol:
        return self._recorder.row(self._label, self._like, row)


class Arena:
    """Memory of which blocks are taken and freed, each at the lowest place that is free.

    Attributes:
        nbytes: Where the highest block that was ever taken ends.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._taken: dict[int, int] = {}
        self._holes: list[tuple[int, int]] = []  # (begin, end), sorted, none beside another

    def take(self, size: int) -> int:
        """Where a block of so many bytes lies."""
        size = -(-max(size, 1) // ALIGNED) * ALIGNED
        for place, (begin, end) in enumerate(self._holes):
            if end - begin >= size:
                if end - begin == size:
                    del self._holes[place]
                else:
                    self._holes[place] = (begin + size, end)
                break
        else:
            begin = self.nbytes
            if self._holes and self._holes[-1][1] == self.nbytes:
                begin = self._holes.pop()[0]
            self.nbytes = begin + size
        self._taken[begin] = size
        return begin

    def free(self, begin: int) -> None:
        """Give a block back."""
        end = begin + self._taken.pop(begin)
        place = bisect.bisect_left(self._holes, (begin, end))
        if place < len(self._holes) and self._holes[place][0] == end:
            end = self._holes.pop(place)[1]
        if place and self._holes[place - 1][1] == begin:
            place -= 1
            begin = self._holes.pop(place)[0]
        self._holes.insert(place, (begin, end))


@dataclass(frozen=True)
class Tape:
    """Calls, one behind the other.

    Attributes:
        words: What the machine code's player reads.
        marks: Words at which it may pause: the first, some on the way, and the end.
        sources: Inputs and constants, in the order of their addresses; those of outputs follow.
        outputs: What it hands out, each in memory of its own.
    """

    words: array[int]
    marks: tuple[int, ...]
    sources: tuple[Source, ...]
    outputs: tuple[Spec, ...]

    def addresses(self, inputs: Mapping[str, Any]) -> list[int]:
        """Of its sources, for the inputs of a run."""
        found: list[int] = []
        for source in self.sources:
            if source.constant is not None:
                found.append(source.constant.data_ptr())
                continue
            assert source.label is not None
            value = inputs[source.label]
            if source.rows is None:
                found.append(value.data_ptr())
            elif isinstance(value, list):
                found += [each.data_ptr() for each in value]
            else:
                first, step = value.data_ptr(), value.stride(0) * value.itemsize
                found += [first + row * step for row in range(source.rows)]
        return found


#: Calls between two pauses, in which Python may see an interrupt.
_BETWEEN = 512

#: Most bytes that one copy may move, and most addresses of a tape: what fits into a word.
_MOST = ELSEWHERE - 1


class Recorder:
    """Writes a tape.

    Attributes:
        arena: The memory of what is computed.
        scratch: Bytes of scratch memory that the calls need.
        functions: For each function its address and the numbers of its inputs and outputs.
    """

    def __init__(self) -> None:
        self.arena = Arena()
        self.scratch = 0
        self.functions: list[int] = []
        self._known_sources: dict[object, Source] = {}
        self._count = 0  # of addresses outside of the arena
        self._words = array("I")
        self._marks = [0]
        self._calls = 0

    def input(self, label: str, like: Any) -> Any:
        """An input of the program.

        Args:
            label: Its label.
            like: An example: a tensor, or a list of tensors.
        """
        if isinstance(like, list):
            return GivenList(self, label, like)
        place = self._addresses((label, False), label, None, None)
        return Given(self, like, place, label, None)

    def row(self, label: str, like: Any, row: int) -> Symbol:
        """A row of an input, or a tensor of a list."""
        place = self._addresses((label, True), label, len(like), None)
        return Given(self, like[row], place + row, label, row)

    def constant(self, tensor: Tensor) -> Symbol:
        """A tensor that belongs to a function of the program."""
        return Symbol(self, spec_of(tensor), self._addresses(id(tensor), None, None, tensor))

    def new(self, spec: Spec) -> Symbol:
        """Memory of the arena."""
        place = self.arena.take(_nbytes(spec)) // ALIGNED
        _check_number(place)
        return Symbol(self, spec, place)

    def function(
        self, code: NativeCode, inputs: int, outputs: Sequence[Spec]
    ) -> Callable[[Sequence[Any]], list[Any]]:
        """What takes the place of machine code while a tape is recorded."""
        self.scratch = max(self.scratch, code.scratch)
        number = FUNCTIONS + len(self.functions) // 3
        self.functions += [code.address, inputs, len(outputs)]

        def call(given: Sequence[Any]) -> list[Any]:
            known = [self._known(each) for each in given]
            results = [self.new(spec) for spec in outputs]
            if any(each.offset for each in known):
                raise UntapedError("a part of a tensor is given to a function")
            self._write(number, *(each.place for each in (*known, *results)))
            return list(results)

        return call

    def copy(self, target: Symbol, source: Symbol) -> None:
        """Write ``target[:] = source``."""
        self._combine(Opcode.COPY, _nbytes(target.spec), target, source)

    def add(self, target: Symbol, other: Symbol) -> None:
        """Write ``target += other``."""
        code = _SUMS.get(target.spec.dtype)
        if code is None:
            raise UntapedError(f"sums of {target.spec.dtype} have no place on a tape")
        size = _nbytes(target.spec) // _itemsize(target.spec.dtype)
        self._combine(code, size, target, other)

    def zero(self, target: Symbol) -> None:
        """Write ``target[:] = 0``."""
        self._combine(Opcode.ZERO, _nbytes(target.spec), target, target)

    def cut(self, results: Sequence[Symbol]) -> Tape:
        """The tape up to here, which ends by handing out `results`; what follows is another."""
        sources = tuple(self._known_sources.values())
        for number, result in enumerate(results):
            _check_number(self._count + number)
            self.copy(Symbol(self, result.spec, ELSEWHERE + self._count + number), result)
        marks = tuple(dict.fromkeys([*self._marks, len(self._words)]))
        tape = Tape(self._words, marks, sources, tuple(each.spec for each in results))
        self._words, self._marks = array("I"), [0]
        return tape

    def _known(self, value: Any) -> Symbol:
        if isinstance(value, Symbol):
            return value
        raise UntapedError(f"{type(value).__name__} has no place on a tape")

    def _addresses(
        self, key: object, label: str | None, rows: int | None, constant: Tensor | None
    ) -> int:
        """The place of the first address of a source."""
        if key not in self._known_sources:
            source = Source(label, rows, constant, self._count)
            self._known_sources[key] = source
            self._count += 1 if rows is None else rows
            _check_number(self._count)
        return ELSEWHERE + self._known_sources[key].first

    def _combine(self, code: Opcode, size: int, target: Symbol, other: Symbol) -> None:
        mine, its = target.spec, other.spec
        alike = (mine.shape, mine.dtype, mine.device) == (its.shape, its.dtype, its.device)
        if not alike or not mine.steps_as(its.stride) or not _is_dense(mine):
            raise UntapedError(f"{mine} and {its} are not alike, or have gaps")
        if max(size, target.offset, other.offset) > _MOST:
            raise UntapedError("more bytes than a word can count")
        places = (target.place, target.offset, other.place, other.offset)
        self._write(code, size, *places)

    def _write(self, *words: int) -> None:
        self._words.extend(words)
        self._calls += 1
        if self._calls % _BETWEEN == 0:
            self._marks.append(len(self._words))


_SUMS = {"torch.float32": Opcode.ADD_FLOATS, "torch.float64": Opcode.ADD_DOUBLES}


def spec_of(tensor: Tensor) -> Spec:
    """What is fixed of a tensor."""
    return Spec(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype), str(tensor.device))


def _check_number(number: int) -> None:
    if number > _MOST:
        raise UntapedError("more places than a word can count")


def _itemsize(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
    return found.itemsize


def _nbytes(spec: Spec) -> int:
    """Of memory that holds a tensor without gaps."""
    return prod(spec.shape) * _itemsize(spec.dtype)


def _is_dense(spec: Spec) -> bool:
    """Whether its elements lie side by side, in whatever order."""
    pairs = zip(spec.shape, spec.stride, strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs) == prod(spec.shape)
