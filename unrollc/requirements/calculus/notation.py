"""How an update is written: the field's letters for θ, G, optimizer state and hyperparameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from unrollc.requirements.calculus.slices import Leaf
from unrollc.step import Role


@dataclass(frozen=True)
class Name:
    """A quantity's name in text and in LaTeX."""

    text: str
    latex: str

    def after_step(self) -> Name:
        """The name of its new value."""
        return Name(f"{self.text}′", f"{self.latex}'")

    def numbered(self, number: int) -> Name:
        """The name with an index; itself for 0."""
        if number == 0:
            return self
        return Name(f"{self.text}_{number}", f"{{{self.latex}}}_{{{number}}}")


THETA = Name("θ", r"\theta")
GRADIENT = Name("G", "G")

_STATE = {
    "exp_avg": Name("m", "m"),
    "exp_avg_sq": Name("v", "v"),
    "max_exp_avg_sq": Name("v_max", r"v_{\max}"),
    "momentum_buffer": Name("b", "b"),
    "exp_inf": Name("u", "u"),
    "square_avg": Name("s", "s"),
    "sum": Name("s", "s"),
    "acc_delta": Name("d", "d"),
    "grad_avg": Name("a", "a"),
    "step": Name("t", "t"),
    "mu_product": Name("P", "P"),
    "ax": Name("θ_avg", r"\bar\theta"),
    "eta": Name("η_t", r"\eta_t"),
    "mu": Name("μ", r"\mu"),
    "prev": Name("G_prev", r"G_{\mathrm{prev}}"),
    "step_size": Name("Δ", r"\Delta"),
}

_HYPER = {
    "lr": Name("η", r"\eta"),
    "betas[0]": Name("β_1", r"\beta_1"),
    "betas[1]": Name("β_2", r"\beta_2"),
    "weight_decay": Name("λ", r"\lambda"),
    "lambd": Name("λ", r"\lambda"),
    "eps": Name("ε", r"\varepsilon"),
    "momentum": Name("μ", r"\mu"),
    "dampening": Name("τ", r"\tau"),
    "alpha": Name("α", r"\alpha"),
    "rho": Name("ρ", r"\rho"),
    "lr_decay": Name("κ", r"\kappa"),
    "momentum_decay": Name("ψ", r"\psi"),
    "t0": Name("t_0", "t_0"),
    "etas[0]": Name("η_minus", r"\eta_{-}"),
    "etas[1]": Name("η_plus", r"\eta_{+}"),
    "step_sizes[0]": Name("Δ_min", r"\Delta_{\min}"),
    "step_sizes[1]": Name("Δ_max", r"\Delta_{\max}"),
}


def short_key(leaf: Leaf) -> str:
    """``exp_avg``, ``betas[1]``, ``theta``, ``grad``."""
    if leaf.role is Role.THETA:
        return "theta"
    if leaf.role is Role.GRADIENT:
        return "grad"
    found = re.match(r'\["(.*?)"\](.*)', leaf.key, re.DOTALL)
    return found[1] + found[2] if found else leaf.key or leaf.label


def name_of(leaf: Leaf) -> Name:
    """The quantity's letter, or its own key where the field has none."""
    if leaf.role is Role.THETA:
        return THETA
    if leaf.role is Role.GRADIENT:
        return GRADIENT
    key = short_key(leaf)
    table = {Role.OPT_STATE: _STATE, Role.HYPER: _HYPER}.get(leaf.role, {})
    return table.get(key, plain(key))


def plain(key: str) -> Name:
    """A key as its own name."""
    escaped = key.replace("_", r"\_")
    return Name(key, key if len(key) == 1 else rf"\mathrm{{{escaped}}}")
