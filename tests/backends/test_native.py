"""Wrappers as C functions: the numbers of the wrapper itself, and refusals of what is unknown.

Each wrapper is run twice, as Python with tensors and as compiled C, and is one of a single library.
"""

import ctypes
import random
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unrollc.backends.native import ALIGNED, UnsupportedError, native, placed
from unrollc.backends.toolchain import toolchain

#: Loops as Inductor writes them, but for the vectors.
LOOPS = """
cpp_double = async_compile.cpp_pybinding(['const float*', 'float*', 'const int64_t'], r'''
extern "C"  void  kernel(const float* in_ptr0, float* out_ptr0, const int64_t ks0)
{
    for (int64_t x = 0; x < ks0; ++x) out_ptr0[x] = 2 * in_ptr0[x];
}
''')
cpp_increase = async_compile.cpp_pybinding(['float*'], r'''
extern "C"  void  kernel(float* in_out_ptr0)
{
    for (int64_t x = 0; x < 6; ++x) in_out_ptr0[x] += 1;
}
''')
cpp_refuse = async_compile.cpp_pybinding(['const float*'], r'''
extern "C"  void  kernel(const float* in_ptr0)
{
    if (in_ptr0[0] > 0) throw std::runtime_error("index out of bounds");
}
''')
"""


def double(source: Tensor, target: Tensor, count: int) -> None:
    target.view(-1)[:count] = 2 * source.view(-1)[:count]


def increase(tensor: Tensor) -> None:
    tensor += 1


#: What the loops do, in Python.
IN_PYTHON: dict[str, Callable[..., None]] = {"cpp_double": double, "cpp_increase": increase}


def wrapper(body: str, inputs: int, loops: str = LOOPS) -> str:
    """A module as Inductor writes it, around the statements of a function."""
    names = "".join(f"arg{number}_1, " for number in range(inputs))
    lines = [f"{names}= args", "args.clear()", *body.strip().splitlines()]
    head = f"{loops}\nclass Runner:\n    def call(self, args):\n"
    return head + "\n".join(f"        {line.strip()}" for line in lines)


def spec(*shape: int, stride: Sequence[int] | None = None, dtype: str = "float32") -> Any:
    """What is fixed of a tensor, in row-major order if nothing is said."""
    found = torch.empty(shape, device="meta").stride() if stride is None else tuple(stride)
    return {"shape": shape, "stride": found, "dtype": f"torch.{dtype}", "device": "cpu"}


def tensor(like: Any) -> Tensor:
    """Of a spec; all of its memory is NaN."""
    dtype = getattr(torch, like["dtype"].removeprefix("torch."))
    found = torch.empty_strided(like["shape"], like["stride"], dtype=dtype)
    ctypes.memset(found.data_ptr(), 0xFF, found.untyped_storage().nbytes())
    return found


# -- a wrapper in Python ----------------------------------------------------------------------


def product_of(*operands: Tensor, out: Tensor, alpha: float = 1, beta: float = 1) -> None:
    *bias, left, right = (each.double() for each in operands)
    result = alpha * torch.einsum("ik,kj->ij", left, right)
    out.copy_(result + beta * bias[0] if bias else result)


def in_python(source: str, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a wrapper returns when it runs as it is."""
    loops = re.findall(r"^(\w+) = async_compile.*?'''\)$", source, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {
        "torch": torch,
        "async_compile": SimpleNamespace(cpp_pybinding=lambda types, text: None),
        "extern_kernels": SimpleNamespace(mm=product_of, addmm=product_of),
        "reinterpret_tensor": torch._C._dynamo.guards._reinterpret_tensor,
        "empty_strided_cpu": lambda shape, stride, dtype: tensor(
            {"shape": shape, "stride": stride, "dtype": str(dtype)}
        ),
    }
    exec(source, namespace)
    namespace |= {name: IN_PYTHON.get(name) for name in loops}
    returned: tuple[Tensor, ...] = namespace["Runner"]().call(list(given))
    return tuple(each.clone() for each in returned)


# -- wrappers ---------------------------------------------------------------------------------

Case = tuple[str, list[Any], list[Any]]


def products(dtype: str, seed: int, count: int = 48) -> Case:
    """Products of matrices of any size, order and distance between rows, also in one buffer."""
    draw = random.Random(seed)
    inputs: list[Any] = []
    outputs: list[Any] = []
    lines: list[str] = []

    def matrix(rows: int, columns: int) -> Any:
        gap = draw.choice([0, 0, 3])
        by_rows = draw.random() < 0.5
        stride = (columns + gap, 1) if by_rows else (1, rows + gap)
        return spec(rows, columns, stride=stride, dtype=dtype)

    def given(like: Any) -> str:
        inputs.append(like)
        return f"arg{len(inputs) - 1}_1"

    for number in range(count):
        m, k, n = (draw.choice([1, 1, 2, 3, 5]) for _ in range(3))
        if draw.random() < 0.3:  # some rows of a matrix, transposed
            rows = given(spec(k + 2, m, dtype=dtype))
            left = f"reinterpret_tensor({rows}, ({m}, {k}), (1, {m}), {m})"
        else:
            left = given(matrix(m, k))
        right, out = given(matrix(k, n)), matrix(m, n)
        lines.append(
            f"buf{number} = empty_strided_cpu({out['shape']}, {out['stride']}, torch.{dtype})"
        )
        factors = f"alpha={draw.choice([1, -0.5])}, beta={draw.choice([1, 0.25])}"
        shapes = [(n,), (m, n), (1, n), (m, 1)]
        if draw.random() < 0.5:
            bias = given(spec(*draw.choice(shapes), dtype=dtype))
            lines.append(
                f"extern_kernels.addmm({bias}, {left}, {right}, {factors}, out=buf{number})"
            )
        else:
            lines.append(f"extern_kernels.mm({left}, {right}, out=buf{number})")
        outputs.append(draw.choice([out, spec(m, n, dtype=dtype)]))
    lines.append(f"return ({''.join(f'buf{number}, ' for number in range(count))})")
    return wrapper("\n".join(lines), len(inputs)), inputs, outputs


#: A buffer that another takes over, scratch memory between two loops, and a number.
REUSED = """
buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
cpp_double(arg0_1, buf0, 6)
buf1 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
cpp_double(buf0, buf1, 6)
buf2 = buf0; del buf0  # reuse
cpp_increase(buf2)
del arg0_1
buf3 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
cpp_double(buf2, buf3, 6)
del buf2
buf4 = reinterpret_tensor(buf1, (3, 2), (2, 1), 0); del buf1  # reuse
cpp_increase(buf4)
return (buf3, buf4, )
"""

#: One buffer as it is, transposed, in part, and once more as it is.
SEVERAL_VIEWS = """
buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
cpp_double(arg0_1, buf0, 6)
buf1 = reinterpret_tensor(buf0, (3, 2), (1, 3), 0)
buf2 = reinterpret_tensor(buf0, (2, 2), (3, 1), 1)
return (buf1, buf0, buf0, buf2, arg0_1, )
"""

#: A part of a buffer alone, and an input whose elements go into another order.
PARTS = """
buf0 = empty_strided_cpu((6, ), (1, ), torch.float32)
cpp_double(arg0_1, buf0, 5)
return (reinterpret_tensor(buf0, (2, ), (1, ), 3), reinterpret_tensor(arg0_1, (), (), 4), arg0_1, )
"""

#: A part of a part, which alone keeps the buffer while another is written.
NESTED = """
buf0 = empty_strided_cpu((6, ), (1, ), torch.float32)
cpp_double(arg0_1, buf0, 6)
buf1 = reinterpret_tensor(buf0, (5, ), (1, ), 1); del buf0  # reuse
buf2 = reinterpret_tensor(buf1, (3, ), (1, ), 2); del buf1  # reuse
cpp_double(buf2, buf2, 3)
buf3 = empty_strided_cpu((6, ), (1, ), torch.float32)
cpp_double(arg0_1, buf3, 6)
cpp_increase(buf3)
buf4 = empty_strided_cpu((6, ), (1, ), torch.float32)
cpp_double(buf3, buf4, 6)
del buf3
return (buf2, buf4, )
"""

REFUSED_INDEX = """
buf0 = empty_strided_cpu((2, 3), (3, 1), torch.float32)
cpp_double(arg0_1, buf0, 6)
cpp_refuse(buf0)
return (buf0, )
"""

CASES: dict[str, Case] = {
    "products, float32": products("float32", 0),
    "products, float64": products("float64", 1),
    "reused": (wrapper(REUSED, 1), [spec(2, 3)], [spec(2, 3), spec(3, 2)]),
    "several views": (
        wrapper(SEVERAL_VIEWS, 1),
        [spec(2, 3)],
        [spec(3, 2), *[spec(2, 3)] * 2, spec(2, 2), spec(2, 3)],
    ),
    "several views, in their own order": (
        wrapper(SEVERAL_VIEWS, 1),
        [spec(2, 3)],
        [spec(3, 2, stride=(1, 3)), *[spec(2, 3)] * 2, spec(2, 2, stride=(1, 2)), spec(2, 3)],
    ),
    "nested": (wrapper(NESTED, 1), [spec(6)], [spec(3), spec(6)]),
    "parts": (
        wrapper(PARTS, 1),
        [spec(2, 3)],
        [spec(2), spec(), spec(2, 3, stride=(1, 2))],
    ),
}

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], str]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The cases as functions of one library; each gives an error's text.

    Loops of the cases need nothing of PyTorch's headers, which take seconds to compile.
    """
    folder = tmp_path_factory.mktemp("native")
    cases = {**CASES, "refused": (wrapper(REFUSED_INDEX, 1), [spec(2, 3)], [spec(2, 3)])}
    texts = []
    for number, case in enumerate(cases.values()):
        text = native(*case).replace("#include <torch/csrc/inductor/cpp_prefix.h>", "")
        text = re.sub(r"\b(unrollc_\w+|cpp_\w+)", rf"\1_{number}", text)
        texts.append(text)
    (folder / "native.cpp").write_text("#include <stdexcept>\n" + "\n".join(texts))
    libraries = Path(torch.__file__).parent / "lib"
    command = [toolchain().compiler, "-shared", "-fPIC", "-O1", "-std=c++17", "native.cpp"]
    command += [f"-L{libraries}", "-ltorch_cpu", f"-Wl,-rpath,{libraries}", "-o", "native.so"]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr[:2000]
    library = ctypes.CDLL(str(folder / "native.so"))

    def of(name: str) -> Run:
        number = list(cases).index(name)
        size = ctypes.c_int64.in_dll(library, f"unrollc_scratch_{number}").value
        entry = getattr(library, f"unrollc_run_{number}")

        def run(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
            scratch = torch.full((size + ALIGNED,), 0xFF, dtype=torch.uint8)
            scratch[size:] = 7
            addresses = [
                (ctypes.c_void_p * len(each))(*[tensor.data_ptr() for tensor in each])
                for each in (inputs, outputs)
            ]
            said = ctypes.create_string_buffer(256)
            failed = entry(*addresses, ctypes.c_void_p(scratch.data_ptr()), said)
            assert bool(failed) == bool(said.value)
            assert (scratch[size:] == 7).all()
            return said.value.decode()

        return run

    return of


def random_inputs(specs: Sequence[Any]) -> list[Tensor]:
    """Gaps between rows are NaN, so that reading one would show."""
    return [tensor(each).normal_() for each in specs]


@pytest.mark.parametrize("name", CASES)
def test_the_c_function_does_what_the_wrapper_does(
    name: str, compiled: Callable[[str], Run]
) -> None:
    source, inputs, outputs = CASES[name]
    given = random_inputs(inputs)
    expected = in_python(source, [each.clone() for each in given])
    before = [each.clone() for each in given]
    results = [tensor(each) for each in outputs]
    assert compiled(name)(given, results) == ""
    for result, wanted in zip(results, expected, strict=True):
        if name.startswith("products"):
            torch.testing.assert_close(result, wanted)
        else:
            assert torch.equal(result, wanted)
    assert all(torch.equal(mine, its) for mine, its in zip(given, before, strict=True))


@pytest.mark.parametrize("sign", [-1, 1])
def test_an_exception_in_a_loop_is_told(sign: int, compiled: Callable[[str], Run]) -> None:
    said = compiled("refused")([sign * torch.ones(2, 3)], [torch.empty(2, 3)])
    assert said == ("index out of bounds" if sign > 0 else "")


def test_a_returned_buffer_is_no_scratch_memory() -> None:
    text = native(*CASES["several views"])
    assert "unrollc_scratch = 0;" in text
    assert f"unrollc_scratch = {ALIGNED};" in native(*CASES["parts"])


def test_parallel_loops_take_no_more_threads_than_there_are() -> None:
    parallel = LOOPS.replace("{\n", "{\n#pragma omp parallel num_threads(3)\n")
    text = native(wrapper(REUSED, 1, parallel), *CASES["reused"][1:])
    assert "num_threads(std::min(3, omp_get_max_threads()))" in text


def test_loops_that_may_raise_are_not_parallel() -> None:
    """An exception that leaves a parallel region ends the process."""
    checked = LOOPS.replace("{\n", "{\n#pragma omp parallel num_threads(3)\nTORCH_CHECK(true);\n")
    assert "#pragma" not in native(wrapper(REUSED, 1, checked), *CASES["reused"][1:])


# -- refusals ---------------------------------------------------------------------------------

ALLOCATED = "buf0 = empty_strided_cpu((2, 2), (2, 1), torch.float32)"

REFUSED = {
    "a statement": f"{ALLOCATED}\nbuf0.zero_()\nreturn (buf0, )",
    "a condition": f"{ALLOCATED}\nif True: pass\nreturn (buf0, )",
    "an assertion": "assert_size_stride(arg0_1, (2, 2), (2, 1))\nreturn (arg0_1, )",
    "several names": "buf0, buf1 = torch.ops.aten.sort.default(arg0_1)\nreturn (buf0, )",
    "another product": f"{ALLOCATED}\nextern_kernels.bmm(arg0_1, arg0_1, out=buf0)\n"
    "return (buf0, )",
    "another op": "buf0 = torch.ops.aten.exp.default(arg0_1)\nreturn (buf0, )",
    "a value": "buf0 = extern_kernels.mm(arg0_1, arg0_1)\nreturn (buf0, )",
    "an option": f"{ALLOCATED}\nextern_kernels.mm(arg0_1, arg0_1, out_dtype=1, out=buf0)\n"
    "return (buf0, )",
    "a constant": f"{ALLOCATED}\nextern_kernels.mm(arg0_1, _tensor_constant0, out=buf0)\n"
    "return (buf0, )",
    "a returned constant": "return (_tensor_constant0, )",
    "a dtype": "buf0 = empty_strided_cpu((2, 2), (2, 1), torch.bfloat16)\nreturn (buf0, )",
    "an integer product": "buf0 = empty_strided_cpu((2, 2), (2, 1), torch.int64)\n"
    "extern_kernels.mm(arg0_1, arg0_1, out=buf0)\nreturn (arg0_1, )",
    "a device": "buf0 = empty_strided_cuda((2, 2), (2, 1), torch.float32)\nreturn (buf0, )",
    "unknown loops": f"{ALLOCATED}\ncpp_other(arg0_1, buf0)\nreturn (buf0, )",
    "missing arguments": f"{ALLOCATED}\ncpp_double(arg0_1, buf0)\nreturn (buf0, )",
    "a matrix with gaps between neighbours": f"{ALLOCATED}\n"
    "extern_kernels.mm(arg0_1, reinterpret_tensor(arg0_1, (2, 2), (4, 2), 0), out=buf0)\n"
    "return (buf0, )",
    "a matrix whose rows overlap": f"{ALLOCATED}\n"
    "extern_kernels.mm(reinterpret_tensor(arg0_1, (2, 2), (1, 1), 0), arg0_1, out=buf0)\n"
    "return (buf0, )",
    "a bias of another shape": f"{ALLOCATED}\n"
    "extern_kernels.addmm(reinterpret_tensor(arg0_1, (4, ), (1, ), 0), arg0_1, arg0_1, out=buf0)\n"
    "return (buf0, )",
    "too many outputs": "return (arg0_1, arg0_1, )",
    "another output": "return (reinterpret_tensor(arg0_1, (4, ), (1, ), 0), )",
    "one value": "return arg0_1",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_counterpart_is_refused(what: str) -> None:
    with pytest.raises(UnsupportedError):
        native(wrapper(REFUSED[what], 1), [spec(2, 2)], [spec(2, 2)])


def test_what_is_refused_is_refused_for_that_alone() -> None:
    accepted = f"{ALLOCATED}\nextern_kernels.mm(arg0_1, arg0_1, out=buf0)\nreturn (buf0, )"
    native(wrapper(accepted, 1), [spec(2, 2)], [spec(2, 2)])
    for inputs, outputs in (
        ([spec(2, 2, dtype="bfloat16")], [spec(2, 2)]),
        ([spec(2, 2)] * 2, [spec(2, 2)]),
        ([spec(2, 2)], [spec(2, 2, dtype="float64")]),
    ):
        with pytest.raises(UnsupportedError):
            native(wrapper(accepted, 1), inputs, outputs)
    with pytest.raises(UnsupportedError, match="no wrapper"):
        native(LOOPS, [], [])


# -- scratch memory ---------------------------------------------------------------------------

Lives = tuple[dict[str, int], dict[str, int], dict[str, int]]


def lives(seed: int) -> Lives:
    """Sizes of buffers, the lines from which they live, and those before which they have died."""
    draw = random.Random(seed)
    sizes, born, dies = {}, {}, {}
    for name in (f"buf{number}" for number in range(draw.randrange(1, 25))):
        sizes[name] = draw.choice([0, 1, 63, 64, 65, 500, draw.randrange(1, 5000)])
        born[name] = draw.randrange(20)
        if draw.random() < 0.9:
            dies[name] = born[name] + draw.randrange(8)
    return sizes, born, dies


def clashes(buffers: Lives, offsets: dict[str, int], total: int) -> list[str]:
    """What is wrong with places, line by line and byte by byte."""
    sizes, born, dies = buffers
    found = []
    for line in range(40):
        taken = torch.zeros(total, dtype=torch.int64)
        for name, size in sizes.items():
            if born[name] <= line < dies.get(name, 40):
                taken[offsets[name] : offsets[name] + size] += 1
        found += [f"line {line}"] if (taken > 1).any() else []
    found += [name for name in sizes if offsets[name] % ALIGNED]
    return found + [name for name in sizes if offsets[name] + sizes[name] > total]


@pytest.mark.parametrize("seed", range(60))
def test_living_buffers_never_overlap(seed: int) -> None:
    buffers = lives(seed)
    assert clashes(buffers, *placed(*buffers)) == []


def test_overlaps_would_be_seen() -> None:
    """Everything at the beginning, and memory that ends too early."""
    found = [clashes(each, dict.fromkeys(each[0], 0), 5000) for each in map(lives, range(60))]
    assert sum(map(bool, found)) > 50
    buffers = {"buf0": 65}, {"buf0": 0}, {"buf0": 1}
    assert clashes(buffers, {"buf0": 0}, 64) == ["buf0"]
    assert clashes(buffers, {"buf0": 1}, 128) == ["buf0"]


def test_buffers_after_one_another_share_their_memory() -> None:
    names = [f"buf{number}" for number in range(10)]
    sizes = dict.fromkeys(names, 100)
    born = {name: 2 * number for number, name in enumerate(names)}
    dies = {name: 2 * number + 3 for number, name in enumerate(names)}
    offsets, total = placed(sizes, born, dies)
    assert total == 2 * 128 and set(offsets.values()) == {0, 128}
    assert placed({}, {}, {}) == ({}, 0)
