"""docs/optimizer_derivatives.md is what its generator writes."""

import pytest
import torch

from tests.requirements.updates import generator


@pytest.mark.skipif(
    not torch.__version__.startswith("2.13"), reason="the page names lines of torch 2.13"
)
def test_the_page_is_what_is_generated() -> None:
    text = generator.page().split("\n", 3)
    written = generator.PAGE.read_text(encoding="utf-8").split("\n", 3)
    assert text[0] == written[0]
    assert text[3] == written[3]


def test_every_optimizer_of_torch_is_on_the_page() -> None:
    text = generator.PAGE.read_text(encoding="utf-8")
    for name in torch.optim.__all__:
        optimizer = getattr(torch.optim, name)
        if isinstance(optimizer, type) and optimizer is not torch.optim.Optimizer:
            assert f"\n## {name}" in text, name
