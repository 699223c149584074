"""Models of other libraries, unmodified: language models, graph networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_geometric.nn import GATConv, GCNConv
from x_transformers import Decoder, TransformerWrapper

import unrollc
from tests.modules.around import Build, adam, assert_exact, held, momentum, twin
from tests.oracles.objectives import Objective

pytestmark = pytest.mark.usefixtures("float64", "quiet")

WORDS, LENGTH = 7, 4


@pytest.fixture
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def texts(steps: int = 2) -> list[dict[str, Tensor]]:
    """Batches of two texts, in which every word occurs; the last one is for validation."""
    order = [torch.randperm(WORDS) for _ in range(steps + 1)]
    return [{"ids": torch.cat([o, o[:1]]).view(2, LENGTH)} for o in order]


def gpt2(dropout: float = 0.0) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=WORDS,
        n_positions=LENGTH,
        n_embd=4,
        n_layer=1,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch["ids"], labels=batch["ids"]).loss


def by_logits(model: nn.Module, batch: Any) -> Tensor:
    """Every position counts: Adam takes the root of a gradient that is zero."""
    logits = model(input_ids=batch["ids"]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["ids"].roll(-1, 1).flatten())


@pytest.mark.parametrize(
    ("loss", "build"), [(own_loss, momentum), (by_logits, adam)], ids=["own loss", "logits"]
)
def test_gpt2(loss: Any, build: Build) -> None:
    """The head is tied to the embedding of words, which therefore gets its gradient twice."""
    assert_exact(gpt2(), texts(), Objective(loss), build=build)


def test_gpt2_with_dropout_is_a_program_over_its_noise() -> None:
    """The same seed gives the same loss and gradient, and the gradient is that of this loss."""
    model = gpt2(dropout=0.2)
    opt, meta = held(model, momentum)
    *train, val = texts()
    program = unrollc.compile(model, opt, unrollc.objective(by_logits))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        result = program(train, val)
        found.append((result.loss, *torch.autograd.grad(result.loss, list(meta.values()))))
    first, again, other = found
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert all(gradient.isfinite().all() for gradient in first)
    shift = 1e-6
    torch.manual_seed(0)
    with torch.no_grad():
        meta["lr"].add_(shift)
        above = program(train, val).loss
        meta["lr"].sub_(2 * shift)
        torch.manual_seed(0)
        below = program(train, val).loss
    assert float((above - below) / (2 * shift)) == pytest.approx(float(first[1]), rel=1e-6)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=5,
        max_position_embeddings=LENGTH,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def masked(steps: int = 2) -> list[dict[str, Tensor]]:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return [{**text, "mask": mask, "labels": torch.randint(3, (2,))} for text in texts(steps)]


def classified(model: nn.Module, batch: Any) -> Tensor:
    return model(input_ids=batch["ids"], attention_mask=batch["mask"], labels=batch["labels"]).loss


def test_bert_with_padding() -> None:
    """The library looks for padding in the mask, unless it is told that it is being compiled."""
    assert_exact(bert(), masked(), Objective(classified))


def test_bert_with_gradient_checkpointing() -> None:
    model = bert()
    plain = twin(model, bert)
    model.gradient_checkpointing_enable()
    assert_exact(model, masked(), Objective(classified), plain=plain)


def decoder(fused: bool) -> nn.Module:
    layers = Decoder(
        dim=4, depth=1, heads=2, attn_dim_head=2, ff_glu=True, use_rmsnorm=True, attn_flash=fused
    )
    return TransformerWrapper(num_tokens=WORDS, max_seq_len=LENGTH - 1, attn_layers=layers)


def continued(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch["ids"][:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), batch["ids"][:, 1:])


def unfused() -> nn.Module:
    """Attention by `torch`, told to use the one kernel that has a second derivative."""
    model = decoder(True)
    for module in model.modules():
        if hasattr(module, "sdp_context_manager"):
            module.sdp_context_manager = lambda: sdpa_kernel(SDPBackend.MATH)
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_x_transformers(fused: bool) -> None:
    """The model asks for fused kernels, which have no second derivative; it does not get them."""
    model = decoder(fused)
    plain = twin(model, unfused) if fused else None
    assert_exact(model, texts(), Objective(continued), plain=plain)


class GraphNetwork(nn.Module):
    def __init__(self, layer: Any, loops: bool) -> None:
        super().__init__()
        self.first = layer(4, 4, add_self_loops=loops)
        self.second = layer(4, 3, add_self_loops=loops)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x, edge_index)), edge_index)


class WithLoops(GraphNetwork):
    """Layers that add the self-loops themselves, on graphs without the last 5 edges."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x, edge_index[:, :-5])


def graphs(steps: int = 2) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Five nodes, six edges between different ones, then five self-loops; three classes."""
    made = []
    for _ in range(steps + 1):
        start = torch.randint(5, (6,))
        edges = torch.stack([start, (start + torch.randint(1, 5, (6,))) % 5])
        loops = torch.arange(5).expand(2, 5)
        made.append(((torch.randn(5, 4), torch.cat([edges, loops], 1)), torch.randint(3, (5,))))
    return made


@pytest.mark.parametrize("layer", [GCNConv, GATConv])
def test_graph_networks(layer: Any) -> None:
    """The self-loops stand in the batch: against the same layers, which add them themselves."""
    model = GraphNetwork(layer, loops=False)
    assert_exact(model, graphs(), plain=twin(model, lambda: WithLoops(layer, loops=True)))


def test_a_layer_that_picks_edges_by_their_values_is_refused() -> None:
    """It takes self-loops out before it adds them, so the number of edges depends on the data."""
    opt, _ = held(model := GraphNetwork(GCNConv, loops=True), momentum)
    *train, val = graphs()
    with pytest.raises(unrollc.CaptureError, match="depends on the data") as caught:
        unrollc.compile(model, opt, F.cross_entropy).lower(train, val)
    assert caught.value.where is not None
    assert "add_self_loops=False" in caught.value.remedy
