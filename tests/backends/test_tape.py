"""Tapes: memory that is taken and given back, what is written, and the player that reads it."""

import ctypes
import gc
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unrollc.backends.kernel import Spec
from unrollc.backends.library import error_of
from unrollc.backends.native import ALIGNED
from unrollc.backends.player import ELSEWHERE, FUNCTIONS, Opcode, player
from unrollc.backends.tape import Arena, Recorder, Symbol, Tape, UntapedError, spec_of
from unrollc.backends.toolchain import toolchain

# -- the arena --------------------------------------------------------------------------------


def rounded(size: int) -> int:
    return max(-(-size // ALIGNED), 1) * ALIGNED


class Blocks:
    """An arena, and what is known of its blocks without it."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.sizes: dict[int, int] = {}

    def take(self, size: int) -> int:
        place = self.arena.take(size)
        assert place % ALIGNED == 0
        assert place == self.lowest(rounded(size))
        self.sizes[place] = rounded(size)
        assert place + rounded(size) <= self.arena.nbytes
        return place

    def free(self, place: int) -> None:
        self.arena.free(place)
        del self.sizes[place]

    def lowest(self, size: int) -> int:
        """The lowest place where a block of so many bytes touches no other."""
        ends = [0, *(begin + length for begin, length in self.sizes.items())]
        return min(
            place
            for place in ends
            if all(
                place + size <= begin or begin + length <= place
                for begin, length in self.sizes.items()
            )
        )


@pytest.mark.parametrize("seed", range(20))
def test_blocks_are_taken_at_the_lowest_free_place(seed: int) -> None:
    """Which says that none overlap, that free memory is used again, and that holes merge."""
    draw = random.Random(seed)
    blocks, most = Blocks(), 0
    for _ in range(200):
        if blocks.sizes and draw.random() < 0.48:
            blocks.free(draw.choice(list(blocks.sizes)))
        else:
            blocks.take(draw.choice([0, 1, 64, 65, draw.randrange(1, 2000)]))
        most = max([most, *(begin + size for begin, size in blocks.sizes.items())])
        assert blocks.arena.nbytes == most
    for place in list(blocks.sizes):
        blocks.free(place)
    assert blocks.take(most) == 0 and blocks.arena.nbytes == most


def test_a_hole_at_the_end_grows() -> None:
    arena = Arena()
    first, second = arena.take(64), arena.take(64)
    arena.free(second)
    assert arena.take(256) == second and arena.nbytes == 320
    arena.free(first)
    assert arena.take(65) == 320


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_holes_merge_in_any_order(order: Sequence[int]) -> None:
    arena = Arena()
    places = [arena.take(64) for _ in range(4)]
    for each in order:
        arena.free(places[each])
    assert arena.take(3 * 64) == 0 and arena.nbytes == 4 * 64


def test_what_is_not_taken_cannot_be_given_back() -> None:
    arena = Arena()
    place = arena.take(64)
    arena.free(place)
    with pytest.raises(KeyError):
        arena.free(place)


# -- symbols ----------------------------------------------------------------------------------


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> Spec:
    return spec_of(torch.empty(shape, dtype=dtype))


def test_memory_of_a_symbol_goes_with_its_last_part() -> None:
    recorder = Recorder()
    whole = recorder.new(spec(4, 32))
    row = whole[2]
    assert (row.place, row.offset, row.spec) == (whole.place, 256, spec(32))
    del whole
    assert recorder.new(spec(1)).place == 512 // ALIGNED  # still taken
    del row
    gc.collect()
    assert recorder.new(spec(1)).place == 0
    assert recorder.new(spec(4, 3, 32))[2][1].offset == 4 * (2 * 3 * 32 + 32)


def test_memory_elsewhere_is_not_the_arenas() -> None:
    recorder = Recorder()
    data = torch.zeros(3, 2)
    whole = recorder.input("data", data)
    row = whole[1]
    constant = recorder.constant(data)
    assert [each.place - ELSEWHERE for each in (whole, row, constant)] == [0, 2, 4]
    assert whole[1].place == row.place and whole[2].place == row.place + 1
    first, step = data.data_ptr(), 8
    rows = [first, first + step, first + 2 * step]
    assert recorder.cut([]).addresses({"data": data}) == [first, *rows, first]
    assert recorder.arena.nbytes == 0


# -- refusals ---------------------------------------------------------------------------------


def code(address: int = 0, scratch: int = 0) -> Any:
    return SimpleNamespace(address=address, scratch=scratch)


def row_of_a_row(recorder: Recorder) -> Any:
    return recorder.input("data", torch.zeros(3, 2))[0][0]


def part_for_a_function(recorder: Recorder) -> Any:
    return recorder.function(code(), 1, [spec(2)])([recorder.new(spec(3, 2))[1]])


def noise(recorder: Recorder) -> Any:
    return recorder.function(code(), 1, [spec(2)])([torch.rand(2)])


def sum_with_gaps(recorder: Recorder) -> Any:
    gaps = recorder.input("data", torch.zeros(3, 4)[:, :2])
    return recorder.new(spec(3, 2)).add_(gaps)


def sum_of_what_has_gaps(recorder: Recorder) -> Any:
    gaps = recorder.input("data", torch.zeros(3, 4)[:, :2])
    return gaps.add_(gaps)


def sum_in_another_order(recorder: Recorder) -> Any:
    turned = recorder.input("data", torch.zeros(2, 3).t())
    return recorder.new(spec(3, 2)) + turned


REFUSED: dict[str, Callable[[Recorder], Any]] = {
    "noise": noise,
    "noise like a tensor": lambda r: torch.rand_like(r.new(spec(2))),  # type: ignore[arg-type]
    "a sum of integers": lambda r: (
        r.new(spec(2, dtype=torch.int64)) + r.new(spec(2, dtype=torch.int64))
    ),
    "a sum of two shapes": lambda r: r.new(spec(2)) + r.new(spec(3)),
    "a sum of two dtypes": lambda r: r.new(spec(2)) + r.new(spec(2, dtype=torch.float64)),
    "a sum in another order": sum_in_another_order,
    "a sum with gaps": sum_with_gaps,
    "a sum of what has gaps": sum_of_what_has_gaps,
    "a part for a function": part_for_a_function,
    "a row of a row": row_of_a_row,
    "an element": lambda r: r.new(spec(2, 2))[0, 1],
    "a row from the end": lambda r: r.new(spec(2, 2))[-1],
    "rows one by one": lambda r: list(r.new(spec(2, 2))),
    "a product": lambda r: r.new(spec(2)) * 2,
    "another op": lambda r: r.new(spec(2)).mul_(2),
    "an op of torch's": lambda r: torch.cos(r.new(spec(2))),  # type: ignore[arg-type]
    "zeros of another dtype": lambda r: torch.zeros_like(
        r.new(spec(2)),  # type: ignore[arg-type]
        dtype=torch.float64,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_on_a_tape_is_refused(what: str) -> None:
    with pytest.raises(UntapedError):
        REFUSED[what](Recorder())


# -- programs on symbols and on tensors -------------------------------------------------------

#: Two functions as kernels are, in terms of addresses.
TEXT = """
extern "C" int difference(char* const* in, char* const* out, char* scratch, char* said)
{
    for (int i = 0; i < 8; ++i)
        ((double*)out[0])[i] = ((double*)in[0])[i] - ((double*)in[1])[i];
    return 0;
}
extern "C" int halves(char* const* in, char* const* out, char* scratch, char* said)
{
    for (int i = 0; i < 8; ++i) ((double*)scratch)[i] = ((double*)in[0])[i] / 2;
    std::memcpy(out[0], scratch, 64);
    for (int i = 0; i < 8; ++i) ((float*)out[1])[i] = ((double*)scratch)[i];
    return 0;
}
extern "C" int failing(char* const* in, char* const* out, char* scratch, char* said)
{
    std::strcpy(said, "index out of bounds");
    return 1;
}
"""

DOUBLES, FLOATS = spec(8, dtype=torch.float64), spec(8)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("player")
    (folder / "player.cpp").write_text(player(ALIGNED) + TEXT)
    command = [toolchain().compiler, "-shared", "-fPIC", "-O1", "player.cpp", "-o", "player.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "player.so"))


class Played:
    """Functions of a library on symbols, and the tapes that come of it."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.recorder = library, Recorder()

    def function(self, name: str, inputs: int, outputs: Sequence[Spec], scratch: int = 0) -> Any:
        address = ctypes.cast(getattr(self.library, name), ctypes.c_void_p).value
        assert address is not None
        return self.recorder.function(code(address, scratch), inputs, outputs)

    def play(self, tape: Tape, arena: Tensor, sources: Sequence[int]) -> list[Tensor]:
        recorder = self.recorder
        outputs = [each.empty() for each in tape.outputs]
        bases = [*sources, *(each.data_ptr() for each in outputs)]
        said = ctypes.create_string_buffer(256)
        for first, last in zip(tape.marks, tape.marks[1:], strict=False):
            failed = self.library.unrollc_play(
                ctypes.c_void_p(tape.words.buffer_info()[0]),
                ctypes.c_int64(first),
                ctypes.c_int64(last),
                (ctypes.c_int64 * len(recorder.functions))(*recorder.functions),
                ctypes.c_void_p(arena.data_ptr()),
                ctypes.c_void_p(arena.data_ptr() + recorder.arena.nbytes),
                (ctypes.c_void_p * len(bases))(*bases),
                said,
            )
            if failed:
                raise error_of(said.value)
        return outputs

    def memory(self) -> Tensor:
        return torch.full((self.recorder.arena.nbytes + self.recorder.scratch,), 0xFF).byte()


def program(seed: int, inputs: Any, difference: Any, halves: Any, length: int = 60) -> Any:
    """A random program on vectors; symbols or tensors go through it."""
    draw = random.Random(seed)
    vectors = [*inputs["single"], inputs["rows"][1], inputs["rows"][0]]
    floats = [torch.zeros_like(inputs["float"])]
    kept = vectors[0].new_empty((length, 8), dtype=torch.float64)
    for number in range(length):
        one, other = draw.choice(vectors), draw.choice(vectors)
        kind = draw.randrange(7)
        if kind == 0:
            vectors += difference([one, other])
        elif kind == 1:
            double, single = halves([one])
            vectors.append(double)
            floats.append(floats[-1] + single)
        elif kind == 2:
            vectors.append(one + other)
        elif kind == 3:
            total = torch.zeros_like(one)
            vectors.append(total.add_(one).add_(other))
        elif kind == 4 and len(vectors) > 6:
            vectors.pop(draw.randrange(4, len(vectors)))
        elif kind == 5 and number:
            vectors.append(one + kept[draw.randrange(number)])
        else:
            floats[-1].add_(inputs["float"])
        kept[number] = one
        del one, other
    return [vectors[-1], floats[-1], kept]


def test_a_tape_does_what_its_program_does(library: ctypes.CDLL) -> None:
    for seed in range(20):
        played = Played(library)
        difference = played.function("difference", 2, [DOUBLES])
        halves = played.function("halves", 1, [DOUBLES, FLOATS], scratch=64)
        given: dict[str, Any] = {
            "single": [torch.randn(8, dtype=torch.float64) for _ in range(2)],
            "rows": torch.randn(2, 8, dtype=torch.float64),
            "float": torch.randn(8),
        }
        symbols = {
            "single": played.recorder.input("single", given["single"]),
            "rows": played.recorder.input("rows", given["rows"]),
            "float": played.recorder.input("float", given["float"]),
        }
        results = program(seed, symbols, difference, halves)
        tape = played.recorder.cut(results)
        found = played.play(tape, played.memory(), tape.addresses(given))
        expected = program(
            seed,
            given,
            lambda pair: [pair[0] - pair[1]],
            lambda single: [single[0] / 2, (single[0] / 2).float()],
        )
        for mine, its in zip(found, expected, strict=True):
            assert torch.equal(mine, its)


def test_a_second_tape_goes_on_in_the_memory_of_the_first(library: ctypes.CDLL) -> None:
    played = Played(library)
    halves = played.function("halves", 1, [DOUBLES, FLOATS], scratch=64)
    given = torch.randn(8, dtype=torch.float64)
    first, _ = halves([played.recorder.input("given", given)])
    forward = played.recorder.cut([first])
    second, _ = halves([first])
    backward = played.recorder.cut([second])
    assert len(backward.words) == len(forward.words) and backward.words is not forward.words
    arena = played.memory()
    assert torch.equal(played.play(forward, arena, [given.data_ptr()])[0], given / 2)
    assert torch.equal(played.play(backward, arena, [given.data_ptr()])[0], given / 4)
    again = played.play(backward, arena.clone(), [given.data_ptr()])
    assert torch.equal(again[0], given / 4)


def test_a_long_tape_pauses_between_calls(library: ctypes.CDLL) -> None:
    played = Played(library)
    given = torch.ones(8, dtype=torch.float64)
    symbol = played.recorder.input("given", given)
    total: Symbol = torch.zeros_like(symbol)  # type: ignore[arg-type, assignment]
    for _ in range(2000):
        total.add_(symbol)
    tape = played.recorder.cut([total])
    assert len(tape.marks) == 5 and tape.marks[-1] == len(tape.words)
    assert torch.equal(played.play(tape, played.memory(), [given.data_ptr()])[0], 2000 * given)


def test_an_error_ends_the_tape(library: ctypes.CDLL) -> None:
    played = Played(library)
    failing = played.function("failing", 1, [DOUBLES])
    given = torch.ones(8, dtype=torch.float64)
    (result,) = failing([played.recorder.input("given", given)])
    result.add_(result)
    with pytest.raises(IndexError, match="out of bounds"):
        played.play(played.recorder.cut([result]), played.memory(), [given.data_ptr()])


def test_functions_are_numbered_behind_the_opcodes() -> None:
    recorder = Recorder()
    number = [recorder.function(code(7 + each), 0, [spec(2)]) for each in range(2)]
    for each in number:
        each([])
    assert recorder.functions == [7, 0, 1, 8, 0, 1]
    assert list(recorder.cut([]).words) == [FUNCTIONS, 0, FUNCTIONS + 1, 0]
    assert max(Opcode) < FUNCTIONS
