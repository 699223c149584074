"""Convolutions, padding, pooling, resizing and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tests.modules.case import Calling, Case, layer, positive

_SIZES = {1: (4,), 2: (3, 4), 3: (2, 3, 3)}


def _each_dimension(
    name: str, build: Callable[..., nn.Module], channels: int = 2, setting: str = ""
) -> list[Case]:
    """A family of three modules (the name holds the dimension) on small inputs."""
    return [
        layer(
            name.format(d),
            setting,
            lambda d=d: build(getattr(nn, name.format(d)), d),
            (1, channels, *_SIZES[d]),
        )
        for d in (1, 2, 3)
    ]


CONVOLUTIONS = [
    *_each_dimension("Conv{}d", lambda kind, d: kind(2, 2, 2)),
    *_each_dimension("ConvTranspose{}d", lambda kind, d: kind(2, 2, 2)),
    layer(
        "Conv2d",
        "stride, dilation, groups",
        lambda: nn.Conv2d(2, 4, 2, stride=2, dilation=2, groups=2, padding=1),
        (1, 2, 4, 4),
    ),
    layer("Conv2d", "padding='same'", lambda: nn.Conv2d(2, 1, 2, padding="same"), (1, 2, 3, 3)),
    layer(
        "ConvTranspose2d",
        "stride, output padding, groups",
        lambda: nn.ConvTranspose2d(2, 4, 2, stride=2, output_padding=1, groups=2, bias=False),
        (1, 2, 2, 2),
    ),
    layer("Conv1d", "no batch dimension", lambda: nn.Conv1d(2, 2, 2), (2, 4)),
    *[
        layer(
            f"Conv{d}d",
            f"padding_mode='{mode}'",
            lambda d=d, mode=mode: getattr(nn, f"Conv{d}d")(1, 1, 2, padding=1, padding_mode=mode),
            (1, 1, *_SIZES[d]),
        )
        for d, mode in [
            (1, "zeros"),
            (1, "reflect"),
            (2, "replicate"),
            (2, "circular"),
            (3, "circular"),
        ]
    ],
]

PADDING = [
    *_each_dimension("ConstantPad{}d", lambda kind, d: kind(1, 0.5)),
    *_each_dimension("ZeroPad{}d", lambda kind, d: kind(1)),
    *_each_dimension("ReflectionPad{}d", lambda kind, d: kind(1)),
    *_each_dimension("ReplicationPad{}d", lambda kind, d: kind(1)),
    *_each_dimension("CircularPad{}d", lambda kind, d: kind(1)),
    layer("ConstantPad1d", "negative", lambda: nn.ConstantPad1d((-1, 1), 0.5), (1, 2, 4)),
]


def _unpooled(d: int) -> Callable[[], nn.Module]:
    def there_and_back(module: Any, x: Tensor) -> Tensor:
        pooled, indices = getattr(F, f"max_pool{d}d")(x, 2, return_indices=True)
        return module(pooled, indices, output_size=x.shape)  # type: ignore[no-any-return]

    return lambda: Calling(there_and_back, getattr(nn, f"MaxUnpool{d}d")(2))


POOLING = [
    *_each_dimension("AvgPool{}d", lambda kind, d: kind(2)),
    *_each_dimension("MaxPool{}d", lambda kind, d: kind(2)),
    *_each_dimension("LPPool{}d", lambda kind, d: kind(2.0, 2)),
    *_each_dimension("AdaptiveAvgPool{}d", lambda kind, d: kind(2)),
    *_each_dimension("AdaptiveMaxPool{}d", lambda kind, d: kind(2)),
    *[
        layer(f"MaxUnpool{d}d", "indices of MaxPool", _unpooled(d), (1, 1, *(2,) * (d - 1), 4))
        for d in (1, 2, 3)
    ],
    layer("AdaptiveAvgPool2d", "output_size=1", lambda: nn.AdaptiveAvgPool2d(1), (1, 2, 2, 3)),
    layer(
        "AvgPool2d",
        "padding, ceil_mode, divisor_override",
        lambda: nn.AvgPool2d(2, padding=1, ceil_mode=True, divisor_override=3),
        (1, 1, 3, 4),
    ),
    layer(
        "MaxPool2d",
        "padding, dilation, return_indices",
        lambda: nn.MaxPool2d(2, padding=1, dilation=2, return_indices=True),
        (1, 1, 4, 4),
    ),
    layer(
        "LPPool1d",
        "norm_type=3",
        lambda: Calling(lambda m, x: m(x * x), nn.LPPool1d(3.0, 2)),
        (1, 2, 4),
    ),
    layer(
        "FractionalMaxPool2d",
        "",
        lambda: nn.FractionalMaxPool2d(2, output_size=2),
        (1, 2, 4, 5),
        noisy=True,
    ),
    layer(
        "FractionalMaxPool3d",
        "",
        lambda: nn.FractionalMaxPool3d(2, output_ratio=0.6),
        (1, 1, 4, 4, 4),
        noisy=True,
    ),
]

RESIZING = [
    *[
        layer(
            "Upsample",
            f"mode='{mode}', {d}d{', align_corners' if aligned else ''}",
            lambda mode=mode, aligned=aligned: nn.Upsample(
                scale_factor=1.5, mode=mode, align_corners=aligned
            ),
            (1, 1, *(2, 3, 2)[:d]),
        )
        for mode, d, aligned in [
            ("nearest", 1, None),
            ("nearest", 2, None),
            ("nearest", 3, None),
            ("linear", 1, None),
            ("linear", 1, True),
            ("bilinear", 2, None),
            ("bilinear", 2, True),
            ("bicubic", 2, None),
            ("bicubic", 2, True),
            ("trilinear", 3, None),
            ("trilinear", 3, True),
        ]
    ],
    layer("UpsamplingNearest2d", "", lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 1, 2, 2)),
    layer("UpsamplingBilinear2d", "", lambda: nn.UpsamplingBilinear2d(size=(3, 4)), (1, 1, 2, 3)),
    *[
        layer(
            "F.interpolate",
            f"mode='{mode}', {d}d{', antialias' if smooth else ''}",
            lambda mode=mode, d=d, smooth=smooth: Calling(
                lambda x: F.interpolate(x, size=(3, 2, 3)[:d], mode=mode, antialias=smooth)
            ),
            (1, 1, *(4, 3, 2)[:d]),
        )
        for mode, d, smooth in [
            ("area", 1, False),
            ("area", 2, False),
            ("area", 3, False),
            ("nearest-exact", 1, False),
            ("nearest-exact", 2, False),
            ("nearest-exact", 3, False),
            ("bilinear", 2, True),
            ("bicubic", 2, True),
            ("lanczos", 2, True),
        ]
    ],
]


def _warped(mode: str, padding: str, d: int) -> Callable[[], nn.Module]:
    """An image sampled where an affine map sends the grid, both moved by parameters."""

    def sample(x: Tensor, theta: Tensor) -> Tensor:
        size = [1, 1, *(2, 3, 2)[:d]]
        grid = F.affine_grid(theta[None], size, align_corners=False)
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=False)

    return lambda: Calling(sample)


SAMPLING = [
    layer(
        "F.grid_sample",
        f"mode='{mode}', padding_mode='{padding}', {d}d, grid by affine_grid",
        _warped(mode, padding, d),
        (1, 1, *(4, 3, 3)[:d]),
        positive(d, d + 1),
    )
    for mode, padding, d in [
        ("bilinear", "zeros", 2),
        ("bilinear", "border", 2),
        ("bilinear", "reflection", 2),
        ("nearest", "zeros", 2),
        ("bicubic", "zeros", 2),
        ("bilinear", "zeros", 3),
        ("nearest", "border", 3),
    ]
] + [
    layer(
        "F.affine_grid",
        "",
        lambda: Calling(lambda t: F.affine_grid(t, [1, 1, 2, 3], align_corners=True)),
        (1, 2, 3),
    ),
]

CASES = [*CONVOLUTIONS, *PADDING, *POOLING, *RESIZING, *SAMPLING]
