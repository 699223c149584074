"""What an implementation hands to whoever measures it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Prepared:
    """A workload that is ready to run: all that compiles ahead of the first call is compiled.

    Attributes:
        call: One run: the meta-gradient summed over the tasks is computed and kept until the next
            call, and the validation loss of each task is returned.
        gradients: The meta-gradient of the last call by the labels of the problem's leaves.
        facts: What is known before the run, such as its predicted peak.
        settle: Waits for what a call has left to be compiled in the background.
    """

    call: Callable[[], list[float]]
    gradients: Callable[[], dict[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict)
    settle: Callable[[], None] | None = None
