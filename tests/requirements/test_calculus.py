"""Derivations equal closed forms, derived by hand from the algorithms' definitions.

Each function returns a derivation, its symbols by key, and the new values and all their
derivatives that are not zero. θ is written x. All symbols are positive; a derivation's own symbols
are replaced by these before comparing. Where roots are taken, the state is written in the root:
"side" writes it so that the radicand is r², which keeps the comparison rational.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
from sympy import Rational, log, sqrt
from torch import optim

from tests.requirements.updates import derived
from unrollc.requirements.calculus.derivation import Derivation

x, G, t = sympy.symbols("x G t", positive=True)
eta, lam, eps = sympy.symbols("eta lambda epsilon", positive=True)

r, r_2 = sympy.symbols("r r_2", positive=True)

Form = tuple[dict[str, Any], dict[tuple[str, str], Any]]
COMMON = {"theta": x, "grad": G, "step": t, "lr": eta, "weight_decay": lam, "eps": eps}


def moments(b1: Any, b2: Any, m: Any, v: Any) -> tuple[Any, Any, dict[tuple[str, str], Any]]:
    """Adam's two moments and their derivatives."""
    slopes = {
        ("exp_avg", "exp_avg"): b1,
        ("exp_avg", "grad"): 1 - b1,
        ("exp_avg", "betas[0]"): m - G,
        ("exp_avg_sq", "exp_avg_sq"): b2,
        ("exp_avg_sq", "grad"): 2 * (1 - b2) * G,
        ("exp_avg_sq", "betas[1]"): v - G**2,
    }
    return b1 * m + (1 - b1) * G, b2 * v + (1 - b2) * G**2, slopes


def through(result: str, slopes: dict[str, Any]) -> dict[tuple[str, str], Any]:
    return {(result, by): slope for by, slope in slopes.items()}


def sgd() -> tuple[Derivation, dict[str, Any], Form]:
    b, mu, tau = sympy.symbols("b mu tau", positive=True)
    found = derived(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.1)
    decayed = G + lam * x
    new_b = mu * b + (1 - tau) * decayed
    buffer = {
        "momentum_buffer": mu,
        "grad": 1 - tau,
        "theta": (1 - tau) * lam,
        "momentum": b,
        "dampening": -decayed,
        "weight_decay": (1 - tau) * x,
    }
    slopes = through("momentum_buffer", buffer)
    slopes |= through("theta", {by: -eta * slope for by, slope in buffer.items()})
    slopes["theta", "theta"] = 1 - eta * (1 - tau) * lam
    slopes["theta", "lr"] = -new_b
    own = {"momentum_buffer": b, "momentum": mu, "dampening": tau}
    return found, own, ({"theta": x - eta * new_b, "momentum_buffer": new_b}, slopes)


def nesterov() -> tuple[Derivation, dict[str, Any], Form]:
    b, mu = sympy.symbols("b mu", positive=True)
    found = derived(optim.SGD, lr=0.1, momentum=0.9, nesterov=True)
    new_b = mu * b + G
    slopes = through("momentum_buffer", {"momentum_buffer": mu, "grad": 1, "momentum": b})
    slopes |= through(
        "theta",
        {
            "theta": 1,
            "grad": -eta * (1 + mu),
            "momentum_buffer": -eta * mu**2,
            "lr": -(G + mu * new_b),
            "momentum": -eta * (new_b + mu * b),
        },
    )
    form = ({"theta": x - eta * (G + mu * new_b), "momentum_buffer": new_b}, slopes)
    return found, {"momentum_buffer": b, "momentum": mu}, form


def adagrad() -> tuple[Derivation, dict[str, Any], Form]:
    s, kappa = sympy.symbols("s kappa", positive=True)
    found = derived(optim.Adagrad, lr_decay=0.1, weight_decay=0.1)
    decayed = G + lam * x
    new_s = s + decayed**2
    root = sqrt(new_s)
    h = root + eps
    rate = eta / (1 + t * kappa)
    by_gradient = -rate * (1 / h - decayed**2 / (root * h**2))
    slopes = through(
        "sum",
        {
            "sum": 1,
            "grad": 2 * decayed,
            "theta": 2 * lam * decayed,
            "weight_decay": 2 * x * decayed,
        },
    )
    slopes |= through(
        "theta",
        {
            "theta": 1 + lam * by_gradient,
            "grad": by_gradient,
            "weight_decay": x * by_gradient,
            "sum": rate * decayed / (2 * root * h**2),
            "lr": -decayed / ((1 + t * kappa) * h),
            "lr_decay": rate * t / (1 + t * kappa) * decayed / h,
            "eps": rate * decayed / h**2,
        },
    )
    form = ({"theta": x - rate * decayed / h, "sum": new_s, "step": t + 1}, slopes)
    side = {s: r**2 - decayed**2}
    return found, {"sum": s, "lr_decay": kappa, "side": side}, form


def adam() -> tuple[Derivation, dict[str, Any], Form]:
    m, v, b1, b2 = sympy.symbols("m v beta1 beta2", positive=True)
    found = derived(optim.Adam)
    n = t + 1
    new_m, new_v, slopes = moments(b1, b2, m, v)
    c1, c2 = 1 - b1**n, 1 - b2**n
    h = sqrt(new_v) / sqrt(c2) + eps
    by_h = eta * new_m / (c1 * h**2)
    h_by_v = 1 / (2 * sqrt(new_v) * sqrt(c2))
    c2_part = sqrt(new_v) * n * b2 ** (n - 1) / (2 * c2 ** Rational(3, 2))
    slopes |= through(
        "theta",
        {
            "theta": 1,
            "grad": -eta * (1 - b1) / (c1 * h) + by_h * h_by_v * 2 * (1 - b2) * G,
            "exp_avg": -eta * b1 / (c1 * h),
            "exp_avg_sq": by_h * h_by_v * b2,
            "lr": -new_m / (c1 * h),
            "betas[0]": -eta / h * ((m - G) / c1 + new_m * n * b1 ** (n - 1) / c1**2),
            "betas[1]": by_h * (h_by_v * (v - G**2) + c2_part),
            "eps": by_h,
        },
    )
    new = {"theta": x - eta * new_m / (c1 * h), "exp_avg": new_m, "exp_avg_sq": new_v, "step": n}
    side = {v: (r**2 - (1 - b2) * G**2) / b2}
    own = {"exp_avg": m, "exp_avg_sq": v, "betas[0]": b1, "betas[1]": b2, "side": side}
    return found, own, (new, slopes)


def rmsprop() -> tuple[Derivation, dict[str, Any], Form]:
    s, alpha = sympy.symbols("s alpha", positive=True)
    found = derived(optim.RMSprop)
    new_s = alpha * s + (1 - alpha) * G**2
    root = sqrt(new_s)
    h = root + eps
    slopes = through(
        "square_avg", {"square_avg": alpha, "grad": 2 * (1 - alpha) * G, "alpha": s - G**2}
    )
    slopes |= through(
        "theta",
        {
            "theta": 1,
            "grad": -eta * (1 / h - (1 - alpha) * G**2 / (root * h**2)),
            "square_avg": eta * G * alpha / (2 * root * h**2),
            "lr": -G / h,
            "alpha": eta * G * (s - G**2) / (2 * root * h**2),
            "eps": eta * G / h**2,
        },
    )
    form = ({"theta": x - eta * G / h, "square_avg": new_s, "step": t + 1}, slopes)
    side = {s: (r**2 - (1 - alpha) * G**2) / alpha}
    return found, {"square_avg": s, "alpha": alpha, "side": side}, form


def centred_rmsprop() -> tuple[Derivation, dict[str, Any], Form]:
    s, a, b, alpha, mu = sympy.symbols("s a b alpha mu", positive=True)
    found = derived(optim.RMSprop, centered=True, momentum=0.9)
    new_s = alpha * s + (1 - alpha) * G**2
    new_a = alpha * a + (1 - alpha) * G
    root = sqrt(new_s - new_a**2)
    h = root + eps
    new_b = mu * b + G / h
    variance = {
        "grad": 2 * (1 - alpha) * (G - new_a),
        "square_avg": alpha,
        "grad_avg": -2 * alpha * new_a,
        "alpha": s - G**2 - 2 * new_a * (a - G),
    }
    buffer = {by: -G / h**2 * slope / (2 * root) for by, slope in variance.items()}
    buffer["grad"] += 1 / h
    buffer |= {"momentum_buffer": mu, "momentum": b, "eps": -G / h**2}
    slopes = through(
        "square_avg", {"square_avg": alpha, "grad": 2 * (1 - alpha) * G, "alpha": s - G**2}
    )
    slopes |= through("grad_avg", {"grad_avg": alpha, "grad": 1 - alpha, "alpha": a - G})
    slopes |= through("momentum_buffer", buffer)
    slopes |= through("theta", {by: -eta * slope for by, slope in buffer.items()})
    slopes |= through("theta", {"theta": 1, "lr": -new_b})
    new = {
        "theta": x - eta * new_b,
        "square_avg": new_s,
        "grad_avg": new_a,
        "momentum_buffer": new_b,
        "step": t + 1,
    }
    own = {"square_avg": s, "grad_avg": a, "momentum_buffer": b, "alpha": alpha, "momentum": mu}
    side = {s: (r**2 + new_a**2 - (1 - alpha) * G**2) / alpha}
    return found, own | {"side": side}, (new, slopes)


def adadelta() -> tuple[Derivation, dict[str, Any], Form]:
    s, d, rho = sympy.symbols("s d rho", positive=True)
    found = derived(optim.Adadelta)
    new_s = rho * s + (1 - rho) * G**2
    A, B = sqrt(d + eps), sqrt(new_s + eps)
    delta = A * G / B
    moved = {
        "grad": A / B - A * G**2 * (1 - rho) / B**3,
        "square_avg": -A * G * rho / (2 * B**3),
        "acc_delta": G / (2 * A * B),
        "rho": -A * G * (s - G**2) / (2 * B**3),
        "eps": G / (2 * A * B) - A * G / (2 * B**3),
    }
    mean = {by: 2 * (1 - rho) * delta * slope for by, slope in moved.items()}
    mean["acc_delta"] += rho
    mean["rho"] += d - delta**2
    slopes = through("square_avg", {"square_avg": rho, "grad": 2 * (1 - rho) * G, "rho": s - G**2})
    slopes |= through("acc_delta", mean)
    slopes |= through("theta", {by: -eta * slope for by, slope in moved.items()})
    slopes |= through("theta", {"theta": 1, "lr": -delta})
    new = {
        "theta": x - eta * delta,
        "square_avg": new_s,
        "acc_delta": rho * d + (1 - rho) * delta**2,
        "step": t + 1,
    }
    side = {s: (r**2 - eps - (1 - rho) * G**2) / rho, d: r_2**2 - eps}
    return found, {"square_avg": s, "acc_delta": d, "rho": rho, "side": side}, (new, slopes)


def adamax(old_wins: bool) -> tuple[Derivation, dict[str, Any], Form]:
    """On either side of the tie of max(β₂u, |G| + ε); there, |G| = G."""
    m, u, b1, b2, margin = sympy.symbols("m u beta1 beta2 margin", positive=True)
    found = derived(optim.Adamax)
    n = t + 1
    c1 = 1 - b1**n
    new_m = b1 * m + (1 - b1) * G
    norm = {"exp_inf": b2, "betas[1]": u} if old_wins else {"grad": sympy.Integer(1), "eps": 1}
    new_u = b2 * u if old_wins else G + eps
    mean = {"exp_avg": b1, "grad": 1 - b1, "betas[0]": m - G}
    slopes = through("exp_avg", mean) | through("exp_inf", norm)
    step = {by: -eta * slope / (c1 * new_u) for by, slope in mean.items()}
    step["betas[0]"] -= eta * new_m * n * b1 ** (n - 1) / (c1**2 * new_u)
    for by, slope in norm.items():
        step[by] = step.get(by, 0) + eta * new_m * slope / (c1 * new_u**2)
    slopes |= through("theta", {"theta": 1, "lr": -new_m / (c1 * new_u), **step})
    new = {"theta": x - eta / c1 * new_m / new_u, "exp_avg": new_m, "exp_inf": new_u, "step": n}
    # The side of the tie: β₂u is G + ε and a margin, or the other way round.
    side = {u: (G + eps + margin) / b2} if old_wins else {eps: b2 * u - G + margin}
    own = {"exp_avg": m, "exp_inf": u, "betas[0]": b1, "betas[1]": b2, "side": side}
    return found, own, (new, slopes)


def nadam() -> tuple[Derivation, dict[str, Any], Form]:
    m, v, P, b1, b2, psi = sympy.symbols("m v P beta1 beta2 psi", positive=True)
    found = derived(optim.NAdam)
    n = t + 1
    new_m, new_v, slopes = moments(b1, b2, m, v)
    base = Rational(24, 25)
    q, q_next = 1 - base ** (n * psi) / 2, 1 - base ** ((n + 1) * psi) / 2
    mu, mu_next = b1 * q, b1 * q_next
    mu_psi = -b1 * base ** (n * psi) * n * log(base) / 2
    mu_next_psi = -b1 * base ** ((n + 1) * psi) * (n + 1) * log(base) / 2
    new_P = P * mu
    c2 = 1 - b2**n
    h = sqrt(new_v) / sqrt(c2) + eps
    first, second = 1 - new_P, 1 - new_P * mu_next
    ahead = (1 - mu) * G / first + mu_next * new_m / second

    def by_schedule(mu_slope: Any, next_slope: Any) -> Any:
        """The slope of `ahead` where β₁ or ψ moves μ and the next μ."""
        return (
            -mu_slope * G / first
            + (1 - mu) * G * P * mu_slope / first**2
            + next_slope * new_m / second
            + mu_next * new_m * (P * mu_slope * mu_next + new_P * next_slope) / second**2
        )

    ahead_slopes = {
        "grad": (1 - mu) / first + mu_next * (1 - b1) / second,
        "exp_avg": mu_next * b1 / second,
        "mu_product": (1 - mu) * G * mu / first**2 + mu_next**2 * new_m * mu / second**2,
        "betas[0]": by_schedule(q, q_next) + mu_next * (m - G) / second,
        "momentum_decay": by_schedule(mu_psi, mu_next_psi),
    }
    h_by_v = 1 / (2 * sqrt(new_v) * sqrt(c2))
    c2_part = sqrt(new_v) * n * b2 ** (n - 1) / (2 * c2 ** Rational(3, 2))
    h_slopes = {
        "grad": h_by_v * 2 * (1 - b2) * G,
        "exp_avg_sq": h_by_v * b2,
        "betas[1]": h_by_v * (v - G**2) + c2_part,
        "eps": sympy.Integer(1),
    }
    slopes |= through(
        "mu_product", {"mu_product": mu, "betas[0]": P * q, "momentum_decay": P * mu_psi}
    )
    for by in {**ahead_slopes, **h_slopes}:
        numerator = ahead_slopes.get(by, 0) / h - ahead * h_slopes.get(by, 0) / h**2
        slopes["theta", by] = -eta * numerator
    slopes |= through("theta", {"theta": 1, "lr": -ahead / h})
    new = {
        "theta": x - eta * ahead / h,
        "exp_avg": new_m,
        "exp_avg_sq": new_v,
        "mu_product": new_P,
        "step": n,
    }
    own = {"exp_avg": m, "exp_avg_sq": v, "mu_product": P, "betas[0]": b1, "betas[1]": b2}
    side = {v: (r**2 - (1 - b2) * G**2) / b2}
    return found, own | {"momentum_decay": psi, "side": side}, (new, slopes)


FORMS: dict[str, Callable[[], tuple[Derivation, dict[str, Any], Form]]] = {
    "SGD": sgd,
    "Nesterov": nesterov,
    "Adagrad": adagrad,
    "Adam": adam,
    "RMSprop": rmsprop,
    "centred RMSprop": centred_rmsprop,
    "Adadelta": adadelta,
    "Adamax, old norm": lambda: adamax(True),
    "Adamax, new norm": lambda: adamax(False),
    "NAdam": nadam,
}


def rational(value: Any, powers: dict[Any, Any]) -> Any:
    """A value with each power βᵗ as a symbol of its own: what is equal then is equal."""
    value = sympy.expand_power_exp(sympy.expand_power_base(value))

    def is_power(e: Any) -> bool:
        return bool(e.is_Pow and not e.exp.is_number)

    def symbol(e: Any) -> Any:
        return powers.setdefault(e, sympy.Dummy(positive=True))

    return value.replace(is_power, symbol)


def is_zero(value: Any, side: dict[Any, Any], powers: dict[Any, Any]) -> bool:
    return value == 0 or sympy.simplify(rational(value.subs(side), powers)) == 0


def differences(derivation: Derivation, own: dict[str, Any], form: Form) -> set[Any]:
    """Where a derivation and a closed form differ, by keys of the result and the input."""
    side = own.get("side", {})
    powers: dict[Any, Any] = {}
    letters = COMMON | own
    known = {symbol: letters[key] for key, symbol in derivation.inputs.items()}
    new, slopes = form
    pairs = {key: (derivation.update(key), value) for key, value in new.items()}
    pairs |= {pair: (derivation.derivative(*pair), value) for pair, value in slopes.items()}
    more = derivation.derivatives.keys() - slopes.keys()
    pairs |= {pair: (derivation.derivative(*pair), sympy.Integer(0)) for pair in more}
    return {
        key
        for key, (found, value) in pairs.items()
        if not is_zero(found.subs(known) - value, side, powers)
    }


@pytest.mark.parametrize("name", FORMS)
def test_a_derivation_equals_the_closed_form(name: str) -> None:
    derivation, own, form = FORMS[name]()
    assert derivation.results.keys() == form[0].keys()
    assert differences(derivation, own, form) == set()


def test_a_wrong_closed_form_is_found() -> None:
    derivation, own, (new, slopes) = rmsprop()
    wrong = {**slopes, ("theta", "eps"): -slopes["theta", "eps"]}
    del wrong["theta", "lr"]
    assert differences(derivation, own, (new, wrong)) == {("theta", "eps"), ("theta", "lr")}
