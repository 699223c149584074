"""Where in the user's code an op comes from."""

from __future__ import annotations

import linecache
import pathlib
import sys
import sysconfig
from types import FrameType

import torch
from torch import nn

from unrollc.errors import Source

_TORCH = str(pathlib.Path(torch.__file__).parent)
_OPTIMIZERS = str(pathlib.Path(torch.optim.__file__).parent)
_OURS = str(pathlib.Path(__file__).parent.parent)
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"]


class SourceFinder:
    """Finds the innermost frame of the user's on the stack.

    Args:
        names: Dotted names of the modules that may be running, by id of the module.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self._names = names

    def here(self, *, optimizer: bool = False) -> Source | None:
        """The user's line that is running now, or None.

        Args:
            optimizer: Whether an optimizer's own lines count, those of `torch.optim` included.
        """
        frame: FrameType | None = sys._getframe(1)
        module = ""
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(_OURS) and frame.f_code.co_name.startswith("run_user_"):
                break
            if not module:
                module = self._module_name(frame)
            if _is_users(file, optimizer):
                text = linecache.getline(file, frame.f_lineno).strip()
                return Source(file, frame.f_lineno, text, module or self._outer_module(frame))
            frame = frame.f_back
        return Source("", 0, "", module) if module else None

    def _module_name(self, frame: FrameType) -> str:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "forward" else None
        return self._names.get(id(owner), "") if isinstance(owner, nn.Module) else ""

    def _outer_module(self, frame: FrameType | None) -> str:
        while frame is not None:
            if name := self._module_name(frame):
                return name
            frame = frame.f_back
        return ""


def _is_users(file: str, optimizer: bool) -> bool:
    if file.startswith(_OURS) or file.startswith("<frozen"):
        return False
    if file.startswith(_TORCH):
        return optimizer and file.startswith(_OPTIMIZERS) and not file.endswith("optimizer.py")
    third_party = "site-packages" in file or "dist-packages" in file
    return third_party or not file.startswith(_STANDARD_LIBRARY)


def error_source(error: BaseException) -> Source | None:
    """The innermost frame of the user's in an exception's traceback."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_users(file, optimizer=True):
            text = linecache.getline(file, trace.tb_lineno).strip()
            found = Source(file, trace.tb_lineno, text)
        trace = trace.tb_next
    return found
