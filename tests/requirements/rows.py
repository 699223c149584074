"""The rows of the grammar: smooth, kinked, cutting and integer ops as Python with holes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A production: an expression with holes.

    Attributes:
        text: Python with holes ``{a}``, ``{b}`` (of any shape), ``{v}``, ``{u}`` (vectors) and
            ``{s}`` (a scalar).
        result: "v", "s", or "" for the broadcast shape of its operands.
        traits: What it may do: "flat" (be constant or zero on a region, so that a gradient that
            exists may vanish at every drawn point), "stop", "read", "singular".
    """

    text: str
    result: str = ""
    traits: frozenset[str] = frozenset()


def rows(text: str, result: str = "", *traits: str) -> list[Row]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return [Row(line, result, frozenset(traits)) for line in lines]


SMOOTH_EACH = rows("""
    torch.tanh({a})
    torch.sin({a})
    {a}.square()
    F.softplus({a})
    torch.log1p({a}.square())
    torch.sigmoid({a})
    torch.exp(torch.tanh({a}))
    ({a} * 0.7 + 0.2)
    (1.5 - {a})
    torch.sqrt(1 + {a} ** 2)
    F.gelu({a})
    F.silu({a})
    torch.rsqrt(0.5 + {a}.square())
    ({a} + {b} * 0.7)
    ({a} - {b} * 0.6)
    torch.sub({a}, {b}, alpha=0.6)
    {a} * {b}
    {a} / (1 + {b}.square())
    torch.addcmul({a}, {a}, {b}, value=0.3)
    torch.lerp({a}, {b} * {a}.cos(), 0.3)
    torch.where(MASK, {a}, {b} * 0.7 + {a}.sin())
""")
SMOOTH_VECTOR = rows(
    """
    MIX @ {v}
    C * torch.softmax({v} * C, 0)
    C * torch.log_softmax({v} * C, 0)
    F.layer_norm({v} * C, (3,), D, C)
    torch.roll({v}, 1)
    {v}.flip(0) * C
    torch.cumsum({v} * C, 0)
    {v}[INDEX] * C
    F.linear({v}.unsqueeze(0), MIX, C).squeeze(0)
    MIX @ torch.cat([{v}, {u}])[1:4]
    torch.stack([{v}, {u} * 0.6]).mean(0)
    (MIX @ {v})[1].expand(3) * C
    ({v}.unsqueeze(0) @ MIX).squeeze(0)
    torch.outer({v}, {u}).sum(0) * C
    torch.zeros(3).copy_({v}) * C
    torch.einsum("i,ij->j", {v}, MIX)
    """,
    "v",
)
# Where v is a multiple of D, the sum is too, and constant once normalised, up to its sign.
SMOOTH_VECTOR += rows("F.normalize({v} + D, dim=0, eps=1e-3) * C", "v", "flat")
SMOOTH_VECTOR += rows("{v} / (1 + {v}.square().sum())", "v")
KINKED = rows(
    """
    torch.relu({a})
    torch.abs({a})
    torch.clamp({a}, -0.8, 0.7)
    torch.clamp({a}, min=-0.4)
    F.leaky_relu({a}, 0.2)
    torch.maximum({a}, {b})
    torch.minimum({a}, 0.6 * {b})
    torch.where({a} > 0.3, {a}, {b})
    torch.where({b} > {a}, {a} * 0.6, {b}.square())
    F.hardtanh({a})
    F.elu({a})
    torch.fmod({a}, 0.9)
    torch.relu({a} - stop({a}) + 0.5)
    F.huber_loss({a}, {a}.sin(), reduction="none", delta=0.3)
    """,
    "",
    "flat",
)
KINKED_VECTOR = rows(
    """
    {v}.sort().values * C
    {v}.max() * C
    MIX @ torch.topk({v}, 2).values[INDEX % 2]
    F.max_pool1d({v}.reshape(1, 1, 3), 2, 1).reshape(2)[INDEX % 2] * C
    {v}.masked_fill({v} > 0.5, 0.5)
    EYE.index_select(0, {v}.argmax(0, keepdim=True)).squeeze(0) * {v}
    {v}.gather(0, {v}.argmax(0, keepdim=True)) * C
    """,
    "v",
    "flat",
)
CUTTING = [
    *rows(
        """
        stop({a})
        untracked(lambda: torch.tanh({a}))
        {a} * stop({b})
        ({a} + stop(torch.round({a}) + 0.3 - {a}))
        ({a} / stop({a}))
        """,
        "",
        "stop",
    ),
    *rows(
        """
        torch.sign({a})
        torch.round({a} * 3) / 3
        torch.floor({a} * 2) * 0.5
        torch.ceil({a})
        torch.trunc({a} * 2)
        ({a} > 0.2).double()
        ({a} * 4).long() * 0.3
        torch.where({a} > 0, 0.8, -0.3)
        torch.div({a} * 3, 0.7, rounding_mode="floor")
        torch.bucketize({a}, D).double()
        """,
        "",
        "flat",
    ),
    *rows("""
        torch.zeros_like({a})
        torch.ones_like({a})
        {a} * 0
        0.0 * {a}
        {a} * torch.zeros_like({a})
        ({a} - {a})
        {a} / {a}
        {a} ** 0
        torch.sub({a}, {a})
        torch.full_like({a}, 0.4)
        torch.relu({a} * 0)
        torch.square({a} - {a})
        torch.where(MASK, {a} * 0, {a} - {a})
        torch.lerp({b}.cos(), {a}, 0)
        torch.addcmul({b}.cos(), {a}, {b}, value=0)
        torch.cat([{a}.reshape(-1) * 0, {a}.reshape(-1) * 0]).sum() * {b}
    """),
]
CUTTING_VECTOR = rows(
    """
    EYE.index_select(0, {v}.argmax(0, keepdim=True)).squeeze(0)
    C.gather(0, {v}.argmax(0, keepdim=True)) * C
    C[torch.argsort({v})]
    ({v}.unsqueeze(0) > {v}.unsqueeze(1)).double().sum(0)
    """,
    "v",
    "flat",
)
READS = rows("read({s}) * {a}", "", "read")

#: Out of a vector: weights differ, so that no sum cancels.
SMOOTH_REDUCTIONS = rows(
    """
        ({v} * C).sum()
        ({v} * C).mean()
        {v}.square().mean()
        torch.dot({v}, D)
        torch.logsumexp({v}, 0)
        (MIX @ {v})[0]
        ({v} - C).square().mean()
        F.mse_loss({v}, D)
        torch.var({v} * C)
        F.cross_entropy(({v} * C).unsqueeze(0), INDEX[:1])
        {v}.unsqueeze(1).mul(MIX).square().sum()
        """,
    "s",
)
KINKED_REDUCTIONS = rows(
    """
        ({v} * C).abs().mean()
        {v}.norm()
        {v}.amax()
        F.smooth_l1_loss({v}, C)
        F.l1_loss({v}, D)
        """,
    "s",
    "flat",
)

#: How a learned parameter enters, by class; what it is cut by cuts it unless it enters elsewhere.
ENTRIES: dict[str, list[Row]] = {
    "smooth": [Row("{a}"), *SMOOTH_EACH[:13]],
    "kinked": KINKED,
    "cut": CUTTING,
    "singular": rows(
        """
        torch.sqrt({a})
        {a} ** 0.5
        torch.log({a})
        {a}.reciprocal()
        torch.sqrt({a}.abs())
        """,
        "",
        "singular",
        "flat",
    ),
}

#: How a scalar meets what depends on the weights, to be a term of the loss.
JOINS = rows("""
    {s} * {t}
    ({p} * {s} - C).square().mean()
    torch.tanh({p} + {s} * D).square().mean()
    {t} / (1 + {s}.square())
    F.softplus({t} + {s})
    torch.exp(torch.tanh({s})) * {t}
""")
ADDITIVE = rows("{s}\n0.3 * {s}.square()")
#: Only a scale, which some updates divide out again.
SCALES = rows("{s} * {t}")

UPDATE_SMOOTH = [
    *SMOOTH_EACH[:8],
    *rows("""
    ({a} + {b} * 0.7)
    ({a} - {b} * 0.6)
    {a} * {b}
    {a} / (1 + {b}.square())
    {a}.detach()
    {a}.detach().mul(0.9)
    {a}.data * {b}
    {a} / ({b}.square().sqrt() + 0.1)
    torch.clone({v}).mul_(0.8).add_({b}, alpha=0.3)
    torch.addcdiv({a}, {b}, {a}.square() + 0.5, value=-0.3)
"""),
]
UPDATE_KINKED = rows(
    """
    torch.abs({a})
    {a}.clamp(-0.3, 0.25)
    torch.maximum({a}, {b})
    torch.where({a} > 0, {a}, 0.1 * {b})
    {a} * torch.clamp(0.5 / ({a}.norm() + 1e-3), max=1.0)
    """,
    "",
    "flat",
)
UPDATE_CUTTING = [
    *rows(
        """
        torch.sign({a})
        torch.round({a} * 4) * 0.2
        ({a} > {b}).double()
        torch.sign({a}) * {b}
        """,
        "",
        "flat",
    ),
    *rows("{a} * 0\n({a} - {a})\ntorch.zeros_like({a})"),
]
UPDATE_NORMALISING = rows("""
    g / g.norm()
    g / g.abs().max()
    g / g.square().sum().sqrt()
    g / (g * D).sum()
""")
