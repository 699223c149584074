"""What compiled code depends on besides its source: the compiler, the processor, PyTorch."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unrollc.backends import library, native, player, spread, verify, views, worker
from unrollc.backends.kernel import Kernel
from unrollc.errors import BackendError

#: Compilers that are looked for where ``$CXX`` names none.
_COMPILERS = ("g++", "clang++", "c++")


@dataclass(frozen=True)
class Toolchain:
    """What compiles, and for what.

    Attributes:
        compiler: Path of the C++ compiler.
        version: What it says of itself.
        processor: The processor with its instruction sets.
    """

    compiler: str
    version: str
    processor: str


def toolchain() -> Toolchain:
    """Of this machine.

    Raises:
        BackendError: If there is no C++ compiler.
    """
    return _toolchain(os.environ.get("CXX", ""))


@functools.lru_cache
def _toolchain(chosen: str) -> Toolchain:
    names = (chosen,) if chosen else _COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BackendError(
            f"there is no C++ compiler: {', '.join(names)} cannot be found",
            why="Inductor compiles a program to machine code",
            remedy='install g++ (or set CXX to another compiler), or pass backend="aten"',
        )
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return Toolchain(os.path.realpath(found), said.stdout.partition("\n")[0], _processor())


def _processor() -> str:
    """Name and instruction sets; Linux lists them, elsewhere the name has to do."""
    known = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for field in ("model name", "flags", "Features"):
        known += [line.partition(":")[2].strip() for line in lines if line.startswith(field)][:1]
    return "; ".join(known)


def key_of(kernel: Kernel, threads: int, tools: Toolchain) -> str:
    """The name of a kernel's machine code: a digest of all that it depends on."""
    parts = {
        "text": kernel.text,
        "inputs": [asdict(spec) for spec in kernel.inputs],
        "threads": threads,
        "tools": asdict(tools),
        "torch": [torch.__version__, torch.version.git_version],
        "accelerators": [_accelerator(name) for name in sorted(_devices(kernel))],
        "makers": [Path(str(each.__file__)).read_text(encoding="utf-8") for each in _MAKERS],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


#: The modules that decide what machine code is made of a kernel.
_MAKERS = (worker, native, views, player, spread, library, verify)


def _devices(kernel: Kernel) -> set[str]:
    return {spec.device for spec in (*kernel.inputs, *kernel.outputs)}


def _accelerator(name: str) -> list[str]:
    """What code for a device depends on, where it is not the machine's processor."""
    device = torch.device(name)
    namespace: Any = getattr(torch, device.type, None)
    if not hasattr(namespace, "get_device_properties"):
        return [name]
    return [name, str(torch.version.cuda), str(namespace.get_device_properties(device))]


def environment(inherited: Mapping[str, str], paths: list[str]) -> dict[str, str]:
    """Variables of a worker process: those of this one without what would change its output."""
    kept = {key: value for key, value in inherited.items() if not key.startswith(_SETTINGS)}
    path = os.pathsep.join(each for each in paths if each)
    # Workers check kernels side by side: threads that spin while they wait hold each other up.
    return {"OMP_WAIT_POLICY": "passive", **kept, "PYTHONPATH": path}


#: How the names of variables begin from which Inductor takes settings.
_SETTINGS = ("TORCHINDUCTOR_", "AOT_INDUCTOR_", "AOTINDUCTOR_", "TORCH_COMPILE_", "TORCH_LOGS")
