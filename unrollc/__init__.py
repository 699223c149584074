"""unrollc: exact meta-gradients through unrolled training, compiled."""

from unrollc.api import (
    BatchedResult,
    BudgetError,
    CaptureError,
    FirstOrder,
    InputError,
    Lowered,
    NonFiniteError,
    NotYetError,
    PerStep,
    Program,
    RequirementError,
    Requirements,
    Result,
    SpillError,
    Truncated,
    UnrollcError,
    check,
    compile,
    objective,
    repeat,
)

__version__ = "0.1.0"

__all__ = [
    "BatchedResult",
    "BudgetError",
    "CaptureError",
    "FirstOrder",
    "InputError",
    "Lowered",
    "NonFiniteError",
    "NotYetError",
    "PerStep",
    "Program",
    "RequirementError",
    "Requirements",
    "Result",
    "SpillError",
    "Truncated",
    "UnrollcError",
    "check",
    "compile",
    "objective",
    "repeat",
]
