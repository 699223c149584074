"""The process that compiles: kernels as texts in, shared libraries out.

Run as a program with one argument, a folder that holds ``job.json``; what it makes goes into one
folder a kernel beside it, and nothing else of the folder is kept. It imports torch and the modules
beside it that need torch alone. A process of its own keeps Inductor's settings, caches and threads
apart from the user's, and lets kernels be compiled side by side and in the background.

A kernel for a processor becomes one C function (see `native`); one for an accelerator, or with
convolutions and other ops that PyTorch's library runs, is left to Inductor's own C++ wrapper.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any


def _beside(name: str) -> ModuleType:
    """A module of this folder.

    Where this file runs as a program, that is without the package: to import that takes longer
    than a kernel does.
    """
    package = __package__
    if not package:
        package = "unrollc_worker"
        folder = sys.modules.setdefault(package, ModuleType(package))
        folder.__path__ = [str(Path(__file__).parent)]
    return importlib.import_module(f"{package}.{name}")


library = _beside("library")
native = _beside("native")
player = _beside("player")
spread = _beside("spread")
verify = _beside("verify")
views = _beside("views")

#: What Inductor must not change, and what only costs time; all of it is part of a kernel's key.
SETTINGS: dict[str, Any] = {
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.vec_isa_ok": True,  # the key names the processor; a test compilation would say the same
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
    "aot_inductor.compile_wrapper_opt_level": "O1",
    "size_asserts": False,
    "fallback_random": True,
    "compile_threads": 1,
}

#: What a kernel's folder may hold when it is done.
KEPT = (".so", ".json", ".cubin")


def main(folder: Path) -> None:
    """Compile every kernel of a job; what goes wrong with one stands in its folder."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with contextlib.ExitStack() as stack:
        scratch = folder / "scratch"
        if len(str(scratch).split()) > 1:  # Inductor splits its command lines at spaces
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
        _compile_all(folder, job, scratch)


def _compile_all(folder: Path, job: dict[str, Any], scratch: Path) -> None:
    warnings.simplefilter("ignore")  # of Inductor's about itself
    parent = os.getppid()
    hurried = True
    for name, kernel in job["kernels"].items():
        if os.getppid() != parent:
            return  # nobody waits any more
        if hurried and not kernel["awaited"]:
            hurried = False
            _give_way()
        home = folder / name
        home.mkdir()
        try:
            _compile(home, scratch / "build", kernel, job["settings"])
        except Exception as error:  # whatever it is, the parent process reports it
            (home / "error").write_text(_said(error), encoding="utf-8")
        else:
            (home / "done").touch()


def _give_way() -> None:
    """From here on, the process that waited for the first kernels computes."""
    if hasattr(os, "nice"):
        os.nice(10)


def _compile(home: Path, build: Path, kernel: dict[str, Any], settings: dict[str, Any]) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.set_num_threads(kernel["threads"])
    with FakeTensorMode():
        examples = _examples(kernel)
    module = _module(kernel["text"], len(examples))
    options = {
        **SETTINGS,
        **settings,
        "cpp.threads": kernel["threads"],
        "cpp.dynamic_threads": kernel["threads"] > 1,  # as many as torch uses when it runs
        # Precompiling takes longer than it saves on one kernel; the others are not waited for.
        "aot_inductor.precompile_headers": not kernel["awaited"],
        "aot_inductor.output_path": str(build / "kernel.so"),
    }
    shutil.rmtree(build, ignore_errors=True)  # of a kernel that could not be compiled
    build.mkdir(parents=True)
    with torch.no_grad():
        try:
            _compile_alone(home, build, kernel, module, options)
            _check(home, kernel, examples)
        except Exception as error:  # whatever it is, Inductor's own wrapper knows more
            if not isinstance(error, views.UnsupportedError):
                print(f"not compiled as one C function: {_said(error)}")
            for path in home.iterdir():
                path.unlink()
            _compile_wrapped(home, build, module, examples, options)
            _check(home, kernel, examples)
    shutil.rmtree(build)


def _check(home: Path, kernel: dict[str, Any], examples: list[Any]) -> None:
    run = library.runner_of(home, kernel["device"], kernel["outputs"])
    verify.verify(_module(kernel["text"], len(examples)), run, examples)


def _examples(kernel: dict[str, Any]) -> list[Any]:
    """Tensors like those that it takes."""
    import torch

    return [
        torch.empty_strided(
            spec["shape"],
            spec["stride"],
            dtype=getattr(torch, spec["dtype"].removeprefix("torch.")),
            device=spec["device"],
        )
        for spec in kernel["inputs"]
    ]


def _compile_alone(
    home: Path,
    build: Path,
    kernel: dict[str, Any],
    module: Any,
    options: dict[str, Any],
) -> None:
    """As one C function.

    Raises:
        UnsupportedError: If that is not possible.
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    specs = [*kernel["inputs"], *kernel["outputs"]]
    if any(spec["device"] != "cpu" for spec in specs) or _WRAPPED.search(kernel["text"]):
        raise views.UnsupportedError("not on a processor alone")
    chosen = {key: options[key] for key in options if not key.startswith("aot_")} | _ALONE
    with config.patch(chosen):
        written = _written(module, kernel)
        function = native.native(written, kernel["inputs"], kernel["outputs"])
        text = f"{function}\n{player.player(native.ALIGNED)}"
        (build / "native.cpp").write_text(text, encoding="utf-8")
        flags = CppTorchOptions(vec_isa=pick_vec_isa(), warning_all=False)
        builder = CppBuilder("native", str(build / "native.cpp"), flags, str(build))
        command = builder.get_command_line()
    said = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if said.returncode:
        errors = [line for line in said.stderr.splitlines() if "error" in line]
        raise RuntimeError("the C++ compiler failed: " + "\n".join(errors[:5]))
    shutil.move(build / "native.so", home / library.NATIVE)


#: Settings for a C function: loops of few elements run on one thread, where Inductor would start
#: all of them for every loop if their number were not fixed. `native` lets it change nevertheless.
_ALONE = {"cpp.dynamic_threads": False, "cpp.min_chunk_size": 8192}

#: Ops for which Inductor calls PyTorch's library, other than products of two matrices.
_WRAPPED = re.compile(r"aten\.(convolution|bmm|baddbmm)")


def _written(module: Any, kernel: dict[str, Any]) -> str:
    """The Python module that Inductor writes for a graph; nothing is compiled."""
    from unittest import mock

    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = _examples(kernel)
        graph = make_fx(module, select_decomp_table())(*inputs)
        graph = spread.spread(graph)
    joint_graph_passes(graph)
    written: list[str] = []

    def keep(lowering: Any) -> None:
        written.append(lowering.codegen()[0].value)
        raise _WrittenError

    with mock.patch.object(GraphLowering, "compile_to_module", keep):
        try:
            compile_fx_inner(graph, inputs)
        except Exception:
            if not written:
                raise
    return written[0]


class _WrittenError(Exception):
    """Inductor has written its module, and shall not compile it."""


def _compile_wrapped(
    home: Path, build: Path, module: Any, examples: list[Any], options: dict[str, Any]
) -> None:
    """With Inductor's own wrapper."""
    from torch._inductor import aot_compile

    aot_compile(module, tuple(examples), options=options)
    shutil.move(build / "kernel.so", home / library.WRAPPED)
    # Ops that are called through PyTorch's dispatcher stand in a file beside the library.
    for path in build.glob("*.wrapper.json"):
        shutil.move(path, home / "kernel.json")
    for path in build.glob("**/*.cubin"):
        shutil.move(path, home / path.name)


def _module(text: str, count: int) -> Any:
    """The graph that a kernel's text writes down."""
    import torch
    from torch import fx

    graph = fx.Graph()
    inputs = [graph.placeholder(f"v{number}") for number in range(count)]

    def call(op: str, *args: Any, **kwargs: Any) -> fx.Node:
        if op == "getitem":
            return graph.call_function(operator.getitem, args)
        space, name, overload = op.split(".")
        target = getattr(getattr(getattr(torch.ops, space), name), overload)
        return graph.call_function(target, args, kwargs)

    namespace: dict[str, Any] = {"torch": torch, "math": __import__("math")}
    exec(compile(text, "<kernel>", "exec"), namespace)
    graph.output(namespace["compute"](call, *inputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def _said(error: BaseException) -> str:
    """The last error of the chain, without Inductor's advice on debugging it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: " + "\n".join(lines[:12])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
