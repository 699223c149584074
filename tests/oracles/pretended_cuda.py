"""A process of PyTorch without CUDA in which autograd and indexing believe in a CUDA device.

They ask for the device's guard and accelerator before any op is dispatched, so tensors that say
that they are on a CUDA device (`stand_in_cuda`) need both. What is registered here does nothing.
It must be there before PyTorch is imported, so this module imports no torch.
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import sys

_REGISTERED = """
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

struct PretendedGuard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  at::Generator getNewGenerator(DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard) }
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks) }
"""

_CHILD = """
import ctypes, runpy, sys
ctypes.CDLL(sys.argv[1])
import torch
torch.cuda._lazy_init = lambda: None
runpy.run_module(sys.argv[2], run_name="__main__")
"""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("c++")


def printed_by(module: str, folder: pathlib.Path) -> str:
    """What a module prints in a process that believes in a CUDA device.

    Args:
        module: Its dotted name; it is run as ``__main__``.
        folder: An empty folder for the compiled library.

    Raises:
        CalledProcessError: If the process fails; its error output is shown.
    """
    library = _compiled(folder)
    command = [sys.executable, "-c", _CHILD, str(library), module]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        done.check_returncode()
    return done.stdout


def _compiled(folder: pathlib.Path) -> pathlib.Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    root = pathlib.Path(found.origin).parent
    source, library = folder / "registered.cpp", folder / "registered.so"
    source.write_text(_REGISTERED)
    include, lib = root / "include", root / "lib"
    links = [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{include}"]
    command = [str(compiler()), *flags, str(source), "-o", str(library), *links]
    subprocess.run(command, check=True)
    return library
