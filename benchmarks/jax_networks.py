"""The networks of the workloads in JAX: a function for each kind of torch module.

``function_of(model)`` gives ``f(weights, inputs)`` with weights by torch's names. Images have their
channels last, which is what XLA's CPU kernels want, and kernels of convolutions are [height, width,
in, out] to match; `to_jax` and `to_torch` turn a tensor of torch into such an array and back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import networks
import numpy as np
import torch
from jax import Array, lax
from torch import Tensor, nn

Weights = Mapping[str, Array]
Function = Callable[[Weights, Array], Array]


def function_of(module: nn.Module, prefix: str = "") -> Function:
    """The function that a module computes in training mode.

    Raises:
        TypeError: For a module without a row here.
    """
    for kind, make in _ROWS.items():
        if isinstance(module, kind):
            return make(module, prefix)
    raise TypeError(f"{type(module).__name__} is not written in JAX")


def to_jax(tensor: Tensor, *, weight: bool = False) -> Array:
    """Kernels [o, i, h, w] become [h, w, i, o], images [..., c, h, w] become [..., h, w, c]."""
    value = tensor.detach()
    if value.ndim >= 4:
        value = value.permute(2, 3, 1, 0) if weight else value.movedim(-3, -1)
    return jnp.asarray(value.contiguous().numpy())


def to_torch(array: Array, *, weight: bool = False) -> Tensor:
    """The other way."""
    value = torch.from_numpy(np.array(array))
    if value.ndim >= 4:
        value = value.permute(3, 2, 0, 1) if weight else value.movedim(-1, -3)
    return value


def linear(weights: Weights, prefix: str, x: Array) -> Array:
    y = x @ weights[f"{prefix}weight"].T
    bias = weights.get(f"{prefix}bias")
    return y if bias is None else y + bias


def _linear(module: nn.Module, prefix: str) -> Function:
    return lambda weights, x: linear(weights, prefix, x)


def _conv(module: nn.Module, prefix: str) -> Function:
    assert isinstance(module, nn.Conv2d) and isinstance(module.padding, tuple)
    padding = [(p, p) for p in module.padding]

    def run(weights: Weights, x: Array) -> Array:
        kernel, bias = weights[f"{prefix}weight"], weights.get(f"{prefix}bias")
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=layout)
        return y if bias is None else y + bias

    return run


def _normalised(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(axes, keepdims=True) + eps)


def _norm(axes: tuple[int, ...]) -> Callable[[nn.Module, str], Function]:
    def make(module: nn.Module, prefix: str) -> Function:
        assert isinstance(module, nn.BatchNorm2d | nn.LayerNorm)

        def run(weights: Weights, x: Array) -> Array:
            y = _normalised(x, axes, module.eps)
            return y * weights[f"{prefix}weight"] + weights[f"{prefix}bias"]

        return run

    return make


def _windows(x: Array, size: int) -> Array:
    """[n, h, w, c] to [n, h // size, size, w // size, size, c]; what is left over is dropped."""
    n, height, width, channels = x.shape
    rows, columns = height // size, width // size
    whole = x[:, : rows * size, : columns * size]
    return whole.reshape(n, rows, size, columns, size, channels)


def _max_pool(module: nn.Module, prefix: str) -> Function:
    """By selections, the first of equal values winning as in torch. The gradient of ``jnp.max``
    compares with the maximum instead, which XLA may have computed again with another rounding."""
    assert isinstance(module, nn.MaxPool2d) and isinstance(module.kernel_size, int)
    size = module.kernel_size

    def run(weights: Weights, x: Array) -> Array:
        windows = _windows(x, size)
        parts = [windows[:, :, i, :, j] for i in range(size) for j in range(size)]
        return functools.reduce(lambda best, new: jnp.where(new > best, new, best), parts)

    return run


def _average_pool(module: nn.Module, prefix: str) -> Function:
    assert isinstance(module, nn.AvgPool2d) and isinstance(module.kernel_size, int)
    size = module.kernel_size
    return lambda weights, x: _windows(x, size).mean((2, 4))


def _flatten(module: nn.Module, prefix: str) -> Function:
    """In torch's order: channels before places."""
    return lambda weights, x: jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)


def _pointwise(function: Callable[[Array], Array]) -> Callable[[nn.Module, str], Function]:
    return lambda module, prefix: lambda weights, x: function(x)


def _sequential(module: nn.Module, prefix: str) -> Function:
    parts = [function_of(part, f"{prefix}{name}.") for name, part in module.named_children()]

    def run(weights: Weights, x: Array) -> Array:
        for part in parts:
            x = part(weights, x)
        return x

    return run


def _bottleneck(module: nn.Module, prefix: str) -> Function:
    parts = {name: function_of(part, f"{prefix}{name}.") for name, part in module.named_children()}

    def run(weights: Weights, x: Array) -> Array:
        inner = parts["narrow"](weights, jax.nn.relu(parts["norm_1"](weights, x)))
        new = parts["wide"](weights, jax.nn.relu(parts["norm_2"](weights, inner)))
        return jnp.concatenate([x, new], -1)

    return run


def _attention(module: nn.Module, prefix: str) -> Function:
    assert isinstance(module, networks.Attention)
    heads = module.heads

    def run(weights: Weights, x: Array) -> Array:
        n, length, width = x.shape
        mixed = linear(weights, f"{prefix}mix.", x).reshape(n, length, 3, heads, -1)
        query, key, value = (mixed[:, :, i] for i in range(3))
        scores = jnp.einsum("nqhd,nkhd->nhqk", query, key) / (width // heads) ** 0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        found = jnp.einsum("nhqk,nkhd->nqhd", shares, value)
        return linear(weights, f"{prefix}out.", found.reshape(n, length, width))

    return run


def _block(module: nn.Module, prefix: str) -> Function:
    parts = {name: function_of(part, f"{prefix}{name}.") for name, part in module.named_children()}

    def run(weights: Weights, x: Array) -> Array:
        x = x + parts["attention"](weights, parts["norm_1"](weights, x))
        return x + parts["wide"](weights, parts["norm_2"](weights, x))

    return run


def _gpt(module: nn.Module, prefix: str) -> Function:
    assert isinstance(module, networks.GPT)
    blocks, norm = function_of(module.blocks, "blocks."), function_of(module.norm, "norm.")

    def run(weights: Weights, tokens: Array) -> Array:
        x = weights["words.weight"][tokens] + weights["positions.weight"][: tokens.shape[1]]
        return linear(weights, "head.", norm(weights, blocks(weights, x)))

    return run


_ROWS: dict[type[nn.Module], Callable[[nn.Module, str], Function]] = {
    nn.Sequential: _sequential,
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm2d: _norm((0, 1, 2)),
    nn.LayerNorm: _norm((-1,)),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.Flatten: _flatten,
    nn.Tanh: _pointwise(jnp.tanh),
    nn.ReLU: _pointwise(jax.nn.relu),
    nn.GELU: _pointwise(functools.partial(jax.nn.gelu, approximate=False)),
    networks.Bottleneck: _bottleneck,
    networks.Attention: _attention,
    networks.Block: _block,
    networks.GPT: _gpt,
}


def cross_entropy(logits: Array, target: Array) -> Array:
    """The mean over all targets [...] of logits [..., classes]."""
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, target[..., None], -1).mean()


def lstm_cell(
    weights: Weights, prefix: str, x: Array, memory: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Hidden and cell state [n, hidden], gates in torch's order."""
    hidden, cell = memory
    gates = x @ weights[f"{prefix}weight_ih"].T + weights[f"{prefix}bias_ih"]
    gates = gates + hidden @ weights[f"{prefix}weight_hh"].T + weights[f"{prefix}bias_hh"]
    enter, forget, new, leave = jnp.split(gates, 4, -1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(leave) * jnp.tanh(cell), cell
