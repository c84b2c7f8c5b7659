"""Attention inside documents by their beginnings, as GPUs have it, against the mask, as CPUs have it."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
import torch.nn.functional as F
from helpers.runs import compose
from torch import Tensor

from rsotrain.config.model import ModelConfig
from rsotrain.config.schema import Precision
from rsotrain.models import documents
from rsotrain.models.build import build_model
from rsotrain.models.documents import attention, document_mask, documents_of, takes_documents
from rsotrain.models.llama import Llama
from rsotrain.planner.plan import make_plan

EOS, CPU = 1, torch.device("cpu")
PARTS = [[5, 6, EOS, 7, 8, 9, EOS, EOS, 10, 11, 12, 13], [EOS, 3, 4, 5, 6, 7, 8, 9, 10, 11, EOS, 12]]
TOKENS = torch.tensor(PARTS)
Kernel = Callable[[bool], None]


def one_by_one(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, same: Tensor, *longest: int, **given: Any
) -> Tensor:
    """What torch's kernel for GPUs does, a document after the other: (tokens, heads, head_dim)."""
    assert starts is same
    assert starts.dtype is torch.int32
    assert given["window_size"] == (-1, 0)
    pieces = []
    for start, end in pairwise(starts.tolist()):
        assert 0 <= end - start <= min(longest)
        if end > start:
            piece = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            attended = F.scaled_dot_product_attention(*piece, is_causal=True, enable_gqa=given["enable_gqa"])
            pieces.append(attended[0].transpose(0, 1))
    return torch.cat(pieces)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A CPU that takes documents, or takes them no more."""
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", one_by_one)

    def taken(yes: bool) -> None:
        monkeypatch.setattr(documents, "device_kind", lambda _: "cuda" if yes else "cpu")

    taken(True)
    return taken


def test_a_document_begins_at_a_separator_and_with_a_sequence() -> None:
    starts, longest = documents_of(TOKENS, EOS, CPU)
    assert starts.tolist()[:6] == [0, 2, 6, 7, 12, 22]
    assert set(starts.tolist()[6:]) == {24}
    assert longest == 12
    lengths = {len(documents_of(torch.full((1, n), EOS), EOS, CPU).starts) for n in (1, 8, 15)}
    assert lengths == {17}  # one shape for a compiler
    assert documents_of(torch.full((4, 8), EOS), EOS, CPU).starts.tolist()[:33] == list(range(33))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=["as many", "grouped"])
def test_it_is_the_masked_attention(heads: tuple[int, int], kernel: Kernel) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, 12, n, 8, dtype=torch.float64) for n in (heads[0], heads[1], heads[1])]
    results = []
    for within in (document_mask(TOKENS, EOS), documents_of(TOKENS, EOS, CPU)):
        leaves = [x.clone().requires_grad_() for x in given]
        out = attention(*leaves, within, grouped=heads[0] != heads[1])
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # of float64: other sums


def model(precision: Precision) -> Llama:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig("x", **sizes)  # type: ignore[arg-type]
    return build_model(config, vocab_size=50, precision=precision, device=CPU, seed=0, separator_id=EOS)


def test_a_model_takes_them_from_the_host_or_finds_them(kernel: Kernel) -> None:
    """bfloat16's own resolution is 2⁻⁸; a summed loss of 24 tokens differs by less."""
    ours = model(Precision.bf16_mixed)
    found = ours.model.documents(TOKENS, CPU)
    assert found is not None
    by_documents = ours(TOKENS, TOKENS, found)
    assert torch.equal(by_documents, ours(TOKENS, TOKENS))
    kernel(False)
    assert ours.model.documents(TOKENS, CPU) is None
    masked = ours(TOKENS, TOKENS)
    torch.testing.assert_close(by_documents, masked, rtol=2**-8, atol=0)
    ours.model.separator_id = None
    assert (ours(TOKENS, TOKENS) - masked).abs() > 0.01


def test_where_no_kernel_takes_them_the_mask_is_used(kernel: Kernel) -> None:
    ours = model(Precision.fp32)
    assert ours.model.documents(TOKENS, CPU) is None
    by_mask = ours(TOKENS, TOKENS)
    kernel(False)
    assert torch.equal(ours(TOKENS, TOKENS), by_mask)
    assert not takes_documents(CPU, torch.bfloat16, 64)
    kernel(True)
    assert takes_documents(CPU, torch.bfloat16, 64)
    assert not takes_documents(CPU, torch.bfloat16, 512)


def test_a_device_before_ampere_has_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for capability, takes in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert takes_documents(device, torch.bfloat16, 64) == takes


@pytest.mark.slow
def test_memory_is_linear_in_the_sequence() -> None:
    """As planned for a GPU: with the mask of documents as without one."""
    common = ["model=llama_tiny", "optimizer=adam", "batch_size=1", "model.max_position_embeddings=4096"]
    peaks = {}
    for masked in (False, True):
        for seq_len in (2048, 4096):
            mask = f"data.document_mask={str(masked).lower()}"
            made = make_plan(compose([*common, mask, f"seq_len={seq_len}", "mode=plan"]), gpus=False)
            peaks[masked, seq_len] = made.phases["backward"]["peak"]
    assert peaks[True, 4096] == pytest.approx(peaks[False, 4096], rel=0.01)
    assert peaks[True, 4096] < 2 * peaks[True, 2048]
