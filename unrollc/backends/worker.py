"""The process that compiles: kernels as texts in, shared libraries out.

Run as a program with one argument, a folder that holds ``job.json``; what it makes goes into one
folder a kernel beside it, and nothing else of the folder is kept. It imports torch alone. A process
of its own keeps Inductor's settings, caches and threads apart from the user's, and lets kernels be
compiled side by side and in the background.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

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
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "scratch")
    warnings.simplefilter("ignore")  # of Inductor's about itself
    for name, kernel in job["kernels"].items():
        home = folder / name
        home.mkdir()
        try:
            _compile(home, kernel, job["settings"])
        except Exception as error:  # whatever it is, the parent process reports it
            (home / "error").write_text(_said(error), encoding="utf-8")
        else:
            (home / "done").touch()


def _compile(home: Path, kernel: dict[str, Any], settings: dict[str, Any]) -> None:
    import torch
    from torch._inductor import aot_compile
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.set_num_threads(kernel["threads"])
    with FakeTensorMode():
        examples = [
            torch.empty_strided(
                spec["shape"],
                spec["stride"],
                dtype=getattr(torch, spec["dtype"].removeprefix("torch.")),
                device=spec["device"],
            )
            for spec in kernel["inputs"]
        ]
    module = _module(kernel["text"], examples)
    build = home / "build"
    options = {
        **SETTINGS,
        **settings,
        "cpp.threads": kernel["threads"],
        "aot_inductor.output_path": str(build / "kernel.so"),
    }
    with torch.no_grad():
        aot_compile(module, tuple(examples), options=options)
    (build / "kernel.so").replace(home / "kernel.so")
    # Ops that are called through PyTorch's dispatcher stand in a file beside the library.
    for path in build.glob("*.wrapper.json"):
        path.replace(home / "kernel.json")
    for path in build.glob("**/*.cubin"):
        path.replace(home / path.name)
    shutil.rmtree(build)


def _module(text: str, examples: list[Any]) -> Any:
    """The graph that a kernel's text writes down."""
    import torch
    from torch import fx

    graph = fx.Graph()
    inputs = [graph.placeholder(f"v{number}") for number in range(len(examples))]

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
