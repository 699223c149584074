"""Normalisation, embeddings, recurrence, attention and lazy modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.modules.case import NO_SECOND, Calling, Case, Input, fixed, integers, layer, normal

_SIZES = {1: (3,), 2: (2, 2), 3: (2, 1, 2)}


def _batch_norms() -> list[Case]:
    found = []
    for d in (1, 2, 3):
        for evaluating in (False, True):
            kind = getattr(nn, f"BatchNorm{d}d")
            found.append(
                layer(
                    f"BatchNorm{d}d",
                    "evaluation" if evaluating else "training",
                    lambda kind=kind: kind(2),
                    (3, 2, *_SIZES[d]),
                    evaluating=evaluating,
                )
            )
    return found


NORMS = [
    *_batch_norms(),
    layer("BatchNorm1d", "momentum=None", lambda: nn.BatchNorm1d(2, momentum=None), (4, 2)),
    layer(
        "BatchNorm1d",
        "track_running_stats=False",
        lambda: nn.BatchNorm1d(2, track_running_stats=False, affine=False),
        (4, 2),
    ),
    layer("SyncBatchNorm", "evaluation", lambda: nn.SyncBatchNorm(2), (4, 2), evaluating=True),
    layer("SyncBatchNorm", "training", lambda: nn.SyncBatchNorm(2), (4, 2)),
    *[
        layer(
            f"InstanceNorm{d}d",
            setting,
            lambda d=d, tracked=tracked: getattr(nn, f"InstanceNorm{d}d")(
                2, affine=True, track_running_stats=tracked
            ),
            (2, 2, *_SIZES[d]),
            evaluating=setting == "tracked statistics, evaluation",
        )
        for d, setting, tracked in [
            (1, "", False),
            (2, "", False),
            (3, "", False),
            (1, "tracked statistics, training", True),
            (1, "tracked statistics, evaluation", True),
        ]
    ],
    layer("GroupNorm", "", lambda: nn.GroupNorm(2, 4), (2, 4, 2)),
    layer("LayerNorm", "", lambda: nn.LayerNorm(3)),
    layer("LayerNorm", "two axes, no bias", lambda: nn.LayerNorm((2, 3), bias=False), (2, 2, 3)),
    layer("RMSNorm", "", lambda: nn.RMSNorm(3)),
    layer("RMSNorm", "eps, not affine", lambda: nn.RMSNorm(3, 1e-3, False)),
    layer("LocalResponseNorm", "", lambda: nn.LocalResponseNorm(2), (1, 3, 2)),
    layer(
        "CrossMapLRN2d",
        "",
        lambda: nn.CrossMapLRN2d(2),
        (1, 3, 2, 2),
        refused="its hand-written backward has no derivative, in eager PyTorch neither; use "
        "LocalResponseNorm",
        error="CrossMapLRN2d is computed and differentiated by hand",
    ),
]


def _bag(setting: str, *inputs: Input, **arguments: Any) -> Case:
    given = inputs or (integers(4, 2, 3),)
    build = functools.partial(nn.EmbeddingBag, 4, 2, **arguments)
    return layer("EmbeddingBag", setting, build, *given, finite=NO_SECOND)


def _offsets(*starts: int) -> tuple[Input, Input]:
    return integers(4, 5), fixed(torch.tensor(starts))


EMBEDDINGS = [
    layer("Embedding", "", lambda: nn.Embedding(4, 2), integers(4, 5)),
    layer("Embedding", "padding_idx", lambda: nn.Embedding(4, 2, padding_idx=1), integers(4, 5)),
    layer(
        "Embedding",
        "scale_grad_by_freq",
        lambda: nn.Embedding(4, 2, scale_grad_by_freq=True),
        integers(4, 5),
    ),
    layer("Embedding", "max_norm", lambda: nn.Embedding(4, 2, max_norm=1.0), integers(4, 5)),
    layer(
        "Embedding",
        "max_norm, norm_type=1",
        lambda: nn.Embedding(4, 2, max_norm=1.0, norm_type=1.0),
        integers(4, 5),
    ),
    layer(
        "Embedding",
        "sparse",
        lambda: nn.Embedding(4, 2, sparse=True),
        integers(4, 5),
        refused="the inner gradient of a captured step is dense",
        error="embedding(sparse=True) asks for a sparse gradient",
    ),
    *[_bag(f"mode='{mode}'", mode=mode) for mode in ("sum", "mean", "max")],
    _bag("padding_idx", mode="mean", padding_idx=1),
    _bag("mode='max', padding_idx", mode="max", padding_idx=-3),
    _bag("offsets", *_offsets(0, 2, 2), mode="sum"),
    _bag(
        "mode='mean', offsets, include_last_offset",
        *_offsets(0, 2, 5),
        mode="mean",
        include_last_offset=True,
    ),
    _bag("mode='max', offsets", *_offsets(0, 2), mode="max"),
    layer(
        "EmbeddingBag",
        "per_sample_weights",
        lambda: Calling(
            lambda m, x, w: m(x, per_sample_weights=w), nn.EmbeddingBag(4, 2, mode="sum")
        ),
        integers(4, 2, 3),
        normal(2, 3),
        finite=NO_SECOND,
    ),
    layer(
        "EmbeddingBag",
        "scale_grad_by_freq",
        lambda: nn.EmbeddingBag(4, 2, mode="sum", scale_grad_by_freq=True),
        integers(4, 2, 3),
        refused="PyTorch divides a row's gradient by the frequency of another row",
        error="embedding_bag(scale_grad_by_freq=True) has no right gradient in PyTorch",
    ),
    layer(
        "EmbeddingBag",
        "max_norm",
        lambda: nn.EmbeddingBag(4, 2, max_norm=1.0),
        integers(4, 2, 3),
        instead=lambda: Calling(lambda m, x: m(x).mean(1), nn.Embedding(4, 2, max_norm=1.0)),
    ),
    layer(
        "EmbeddingBag",
        "sparse",
        lambda: nn.EmbeddingBag(4, 2, sparse=True),
        integers(4, 2, 3),
        refused="the inner gradient of a captured step is dense",
        error="embedding_bag(sparse=True) asks for a sparse gradient",
    ),
]


def _packed(kind: Any, enforce: bool) -> Callable[[], nn.Module]:
    def run(module: Any, x: Tensor, lengths: Tensor) -> Any:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce)
        output, state = module(packed)
        return pad_packed_sequence(output)[0], state

    return lambda: Calling(run, kind(2, 2))


RECURRENT = [
    *[
        layer(
            name,
            setting,
            lambda name=name, rest=rest: getattr(nn, name)(2, 2, **rest),
            (steps, 2, 2),
        )
        for name in ("RNN", "LSTM", "GRU")
        for setting, steps, rest in [
            ("", 3, {}),
            ("bidirectional, two layers", 2, {"bidirectional": True, "num_layers": 2}),
        ]
    ],
    layer(
        "RNN",
        "nonlinearity='relu', batch_first",
        lambda: nn.RNN(2, 2, nonlinearity="relu", batch_first=True),
        (1, 3, 2),
    ),
    layer("LSTM", "proj_size", lambda: nn.LSTM(2, 3, proj_size=2), (2, 2, 2)),
    layer("GRU", "bias=False", lambda: nn.GRU(2, 2, bias=False), (2, 2, 2)),
    layer(
        "LSTM",
        "initial state",
        lambda: Calling(lambda m, x, h, c: m(x, (h, c)), nn.LSTM(2, 2)),
        (2, 2, 2),
        (1, 2, 2),
        (1, 2, 2),
    ),
    *[
        layer(
            name,
            "two layers with dropout",
            lambda name=name: getattr(nn, name)(2, 2, num_layers=2, dropout=0.4),
            (2, 2, 2),
            noisy=True,
        )
        for name in ("RNN", "LSTM", "GRU")
    ],
    *[
        layer(
            name,
            "packed sequence",
            _packed(getattr(nn, name), True),
            (3, 2, 2),
            fixed(torch.tensor([3, 1])),
        )
        for name in ("RNN", "LSTM", "GRU")
    ],
    layer(
        "LSTM",
        "packed sequence, not sorted",
        _packed(nn.LSTM, False),
        (3, 2, 2),
        fixed(torch.tensor([1, 3])),
    ),
    layer("RNNCell", "", lambda: nn.RNNCell(2, 3), (2, 2), (2, 3)),
    layer(
        "LSTMCell",
        "",
        lambda: Calling(lambda m, x, h, c: m(x, (h, c)), nn.LSTMCell(2, 3)),
        (2, 2),
        (2, 3),
        (2, 3),
    ),
    layer("GRUCell", "", lambda: nn.GRUCell(2, 3), (2, 2), (2, 3)),
]


def _attention(call: Callable[..., Any], **rest: Any) -> Callable[[], nn.Module]:
    return lambda: Calling(call, nn.MultiheadAttention(4, 2, **rest))


_CAUSAL = torch.triu(torch.ones(3, 3, dtype=torch.bool), 1)
_PADDED = torch.tensor([[False, False, True], [False, False, False]])
_WIDTH = (3, 2, 4)

ATTENTION = [
    layer("MultiheadAttention", "need_weights", _attention(lambda m, x: m(x, x, x)), _WIDTH),
    layer(
        "MultiheadAttention",
        "need_weights=False",
        _attention(lambda m, x: m(x, x, x, need_weights=False)),
        _WIDTH,
    ),
    layer(
        "MultiheadAttention",
        "average_attn_weights=False, batch_first",
        _attention(lambda m, x: m(x, x, x, average_attn_weights=False), batch_first=True),
        (2, 3, 4),
    ),
    layer(
        "MultiheadAttention",
        "attn_mask, key_padding_mask",
        _attention(lambda m, x: m(x, x, x, attn_mask=_CAUSAL, key_padding_mask=_PADDED)),
        _WIDTH,
    ),
    layer(
        "MultiheadAttention",
        "is_causal, need_weights=False",
        _attention(lambda m, x: m(x, x, x, attn_mask=_CAUSAL, is_causal=True, need_weights=False)),
        _WIDTH,
    ),
    layer(
        "MultiheadAttention",
        "kdim, vdim, bias_k, bias_v, add_zero_attn",
        _attention(
            lambda m, q, k, v: m(q, k, v), kdim=2, vdim=3, add_bias_kv=True, add_zero_attn=True
        ),
        _WIDTH,
        (2, 2, 2),
        (2, 2, 3),
    ),
    layer(
        "MultiheadAttention",
        "dropout",
        _attention(lambda m, x: m(x, x, x), dropout=0.4),
        _WIDTH,
        noisy=True,
    ),
    layer(
        "MultiheadAttention",
        "evaluation",
        _attention(lambda m, x: m(x, x, x, need_weights=False)),
        _WIDTH,
        evaluating=True,
    ),
    layer(
        "TransformerEncoderLayer",
        "norm_first, gelu",
        lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.0, "gelu", norm_first=True),
        (2, 2, 4),
    ),
    layer(
        "TransformerEncoderLayer",
        "dropout",
        lambda: nn.TransformerEncoderLayer(4, 2, 3, 0.3),
        (2, 2, 4),
        noisy=True,
    ),
    layer(
        "TransformerEncoderLayer",
        "evaluation, batch_first",
        lambda: nn.TransformerEncoderLayer(4, 2, 3, batch_first=True),
        (2, 2, 4),
        evaluating=True,
    ),
    layer(
        "TransformerDecoderLayer",
        "causal mask",
        lambda: Calling(
            lambda m, x, memory: m(x, memory, tgt_mask=_CAUSAL),
            nn.TransformerDecoderLayer(4, 2, 3, 0.0),
        ),
        (3, 1, 4),
        (2, 1, 4),
    ),
    layer(
        "TransformerEncoder",
        "two layers, src_key_padding_mask",
        lambda: Calling(
            lambda m, x: m(x, src_key_padding_mask=_PADDED),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 3, 0.0), 2),
        ),
        (3, 2, 4),
    ),
    layer(
        "TransformerDecoder",
        "final norm",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(4, 2, 3, 0.0), 1, nn.LayerNorm(4)),
        (2, 1, 4),
        (2, 1, 4),
    ),
    layer(
        "Transformer",
        "masks",
        lambda: Calling(
            lambda m, source, target: m(source, target, tgt_mask=_CAUSAL, tgt_is_causal=True),
            nn.Transformer(4, 2, 1, 1, 3, 0.0),
        ),
        (2, 1, 4),
        (3, 1, 4),
    ),
]


def _initialised(build: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        module = build()
        with torch.no_grad():
            module(torch.randn(shape))
        return module

    return made


LAZY = [
    *[
        layer(
            name.format(d),
            "initialised",
            _initialised(
                lambda name=name, d=d, given=given: getattr(nn, name.format(d))(*given),
                3,
                2,
                *(3, 2, 2)[:d],
            ),
            (3, 2, *(3, 2, 2)[:d]),
        )
        for name, given in [
            ("LazyConv{}d", (2, 2)),
            ("LazyConvTranspose{}d", (2, 2)),
            ("LazyBatchNorm{}d", ()),
            ("LazyInstanceNorm{}d", ()),
        ]
        for d in (1, 2, 3)
    ],
    layer("LazyLinear", "initialised", _initialised(lambda: nn.LazyLinear(2), 2, 3)),
    layer(
        "LazyLinear",
        "not initialised",
        lambda: nn.LazyLinear(2),
        refused="its shapes are not known before the model has seen a batch",
        error="module.weight is not initialised",
    ),
]

CASES = [*NORMS, *EMBEDDINGS, *RECURRENT, *ATTENTION, *LAZY]
