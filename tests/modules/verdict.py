"""The verdict on one case: what its meta-gradient was compared with, or why there is none."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import unrollc
from tests.modules.case import Case, Setup, setup
from tests.oracles import eager, finite, ordinary
from tests.oracles.compare import assert_close
from tests.oracles.noise import SameNoise, seed_of_next_run

EAGER = "eager 1e-10"
NOISY = "eager 1e-10 on the same noise"
COMPOSED = "eager 1e-10, composed of simpler modules"
FINITE = "finite differences 1e-6"


def verdict(case: Case) -> str:
    """Run a case and compare it with its oracle; the words that stand in its row of the page.

    Raises:
        AssertionError: If the gradient is wrong, or if the case is refused and it runs.
    """
    torch.manual_seed(0)
    if case.refused:
        return _refused(case)
    given = setup(case)
    program = unrollc.compile(given.model, given.opt, given.loss)
    seed = seed_of_next_run()
    result = program(given.train, given.val)
    gradients = torch.autograd.grad(result.loss, list(given.meta.values()))
    found: dict[str, Tensor | None] = {"loss": result.loss.detach()}
    found.update(zip(given.meta, gradients, strict=True))
    with torch.random.fork_rng(devices=[]):
        fresh = setup(replace(case, build=case.instead or case.build))
    if case.finite:
        _differ(fresh, found, result.inner_losses)
        return f"{FINITE}: {case.finite}"
    expected = _eagerly(fresh, seed if case.noisy else None)
    if case.instead:  # parameters have other names there, in the same order
        expected = dict(zip(found, expected.values(), strict=True))
        assert_close(found, expected)
        return COMPOSED
    assert_close(found, expected)
    return NOISY if case.noisy else EAGER


def _refused(case: Case) -> str:
    try:
        given = setup(case)
        unrollc.compile(given.model, given.opt, given.loss)(given.train, given.val)
    except unrollc.UnrollcError as error:
        assert case.error in str(error), f"{case.key} is refused with other words:\n{error}"
        return f"refused: {case.refused}"
    raise AssertionError(f"{case.key} is not refused")


def _eagerly(given: Setup, seed: int | None) -> dict[str, Tensor | None]:
    """Loss and gradients by eager double backward."""
    noise: Any = contextlib.nullcontext()
    loss: Any = given.loss
    if seed is not None:
        noise = SameNoise(seed)
        loss = noise.numbered(loss)
    with noise:
        unrolled = eager.unroll(given.model, given.opt, loss, given.train, given.val)
        gradients = unrolled.gradients(list(given.meta.values()))
    assert seed is None or noise.drawn, "nothing random was drawn"
    return {"loss": unrolled.loss.detach(), **dict(zip(given.meta, gradients, strict=True))}


def _differ(given: Setup, found: dict[str, Tensor | None], inner_losses: Tensor) -> None:
    """Compare with ordinary training: its losses, and their finite differences."""
    refusal = None
    try:
        _eagerly(given, None)
    except (NotImplementedError, RuntimeError) as error:
        refusal = error
    assert refusal is not None, "eager double backward would be the better oracle"

    def trained() -> ordinary.Trained:
        return ordinary.train(given.model, given.opt, given.loss, given.train, given.val)

    def final() -> Tensor:
        loss = trained().loss
        assert loss is not None
        return loss

    assert_close({"loss": found["loss"]}, {"loss": final()})
    assert_close({"inner losses": inner_losses}, {"inner losses": trained().inner_losses})
    for name, tensor in given.meta.items():
        gradient = found[name]
        assert gradient is not None, name
        finite.assert_gradient(final, tensor, gradient, rtol=1e-6, directions=1, step=2e-3)
