"""The C function that plays a tape, and the language of tapes.

A tape is a list of 32-bit words, call by call. A call of a function is its number, then the places
of its inputs and of its outputs. A call of one of `Opcode` is the opcode, how many bytes or numbers
it is about, and place and offset of what it changes and of what it reads. A place is a multiple of
some bytes in the arena, or from `ELSEWHERE` on the number of an address outside of it.

Run in the worker process; it imports nothing of the package.
"""

from __future__ import annotations

import enum

#: Places from here on are numbers of addresses, those before lie in the arena.
ELSEWHERE = 1 << 31


class Opcode(enum.IntEnum):
    """What stands on a tape besides functions."""

    COPY = 0
    ADD_FLOATS = 1
    ADD_DOUBLES = 2
    ZERO = 3


#: The first word of a call is an opcode, or from here on a function's number.
FUNCTIONS = 4


def player(aligned: int) -> str:
    """The C++ text of the player, which every library holds.

    Args:
        aligned: Bytes that a place in the arena counts.
    """
    codes = {each.name.lower(): each.value for each in Opcode}
    return _TEXT.format(aligned=aligned, elsewhere=ELSEWHERE, functions=FUNCTIONS, **codes)


_TEXT = """\
#include <cstdint>
#include <cstring>
#include <vector>

template <typename T>
static void unrollc_add(char* target, const char* other, int64_t count)
{{
    T* sum = reinterpret_cast<T*>(target);
    const T* term = reinterpret_cast<const T*>(other);
    for (int64_t i = 0; i < count; ++i) sum[i] += term[i];
}}

// Plays the words of a tape from `first` to `last`; `functions` has an address and the numbers of
// inputs and outputs for each function. Returns as unrollc_run does.
extern "C" int unrollc_play(const uint32_t* words, int64_t first, int64_t last,
    const int64_t* functions, char* arena, char* scratch, char* const* bases, char* said)
{{
    using Function = int (*)(char* const*, char* const*, char*, char*);
    std::vector<char*> found;
    const auto place = [&](uint32_t word) {{
        return word < {elsewhere}u ? arena + size_t(word) * {aligned} : bases[word - {elsewhere}u];
    }};
    for (const uint32_t* at = words + first; at < words + last;) {{
        const uint32_t code = *at++;
        if (code < {functions}) {{
            const int64_t size = at[0];
            char* const target = place(at[1]) + at[2];
            const char* const other = place(at[3]) + at[4];
            at += 5;
            if (code == {copy}) std::memcpy(target, other, size);
            else if (code == {add_floats}) unrollc_add<float>(target, other, size);
            else if (code == {add_doubles}) unrollc_add<double>(target, other, size);
            else std::memset(target, 0, size);
            continue;
        }}
        const int64_t* const function = functions + 3 * (code - {functions});
        const int64_t inputs = function[1], count = function[1] + function[2];
        found.resize(count + 1);
        for (int64_t i = 0; i < count; ++i) found[i] = place(at[i]);
        at += count;
        const auto run = reinterpret_cast<Function>(function[0]);
        const int failed = run(found.data(), found.data() + inputs, scratch, said);
        if (failed) return failed;
    }}
    return 0;
}}
"""
