"""Programs for the shared cases, and their gradients by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import unrollc
from tests.oracles import eager
from tests.oracles.cases import Case
from tests.oracles.compare import assert_close, relative_error


def compiled(case: Case, **options: Any) -> Any:
    """The program of a case, its per-step values put into the optimizer."""
    case.install(unrollc.PerStep)
    return unrollc.compile(
        case.model, case.opt, case.loss, **{"val_loss": case.val_loss, **options}
    )


def gradients(loss: Tensor, meta: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """The gradients of ``loss`` by name, without touching any ``.grad``; None if unreached."""
    found = torch.autograd.grad(loss, list(meta.values()), allow_unused=True, retain_graph=True)
    return dict(zip(meta, found, strict=True))


def assert_equals_eager(
    result: Any, expected: eager.Unrolled, meta: Mapping[str, Tensor], *, rtol: float = 1e-10
) -> None:
    """Hold loss, θ_T, buffers, inner losses and meta-gradients against the eager run.

    Ends with ``result.loss.backward()``, so it wants tensors whose ``.grad`` is None.
    """
    assert result.loss.shape == ()
    assert relative_error(result.loss, expected.loss) < 1e-12
    assert_close(result.params, expected.params, rtol=1e-12)
    assert_close(result.buffers, expected.buffers, rtol=1e-12)
    assert relative_error(result.inner_losses, expected.inner_losses) < 1e-12
    assert all(tensor.grad is None for tensor in meta.values())
    result.loss.backward()
    assert_close(
        {name: tensor.grad for name, tensor in meta.items()},
        gradients(expected.loss, meta),
        rtol=rtol,
    )
