"""The pieces of a block against plain torch, and what they keep."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rsotrain.models import functional
from rsotrain.models.functional import (
    normed_linear,
    rms_norm,
    rotary,
    rotary_tables,
    shared_input_linear,
    swiglu,
    swiglu_linear,
)

EPS = 1e-6
Function = Callable[..., Tensor]


def plain_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    rotated_half = torch.cat([-second, first], dim=-1)
    return x * cos + rotated_half * torch.cat([sin[..., 4:], sin[..., 4:]], dim=-1)


def plain_linears(x: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat([F.linear(x, weight) for weight in weights], dim=-1)


def shared_linears(x: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat(shared_input_linear(x, *weights), dim=-1)


def normed_linears(x: Tensor, norm_weight: Tensor, *weights: Tensor) -> Tensor:
    return torch.cat(normed_linear(x, norm_weight, EPS, *weights), dim=-1)


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


TABLES = rotary_tables(6, 8, 10000.0, torch.device("cpu"))
CASES = {
    "rms_norm": (
        lambda x, weight: rms_norm(x, weight, EPS),
        plain_rms_norm,
        (normal(2, 6, 48, seed=0, scale=3.0), 1 + normal(48, seed=1, scale=0.3)),
    ),
    "swiglu": (swiglu, plain_swiglu, (normal(2, 6, 40, seed=0, scale=3.0), normal(2, 6, 40, seed=1))),
    "linears": (
        shared_linears,
        plain_linears,
        (normal(2, 6, 24, seed=0), normal(16, 24, seed=1), normal(8, 24, seed=2), normal(40, 24, seed=3)),
    ),
    "normed_linears": (
        normed_linears,
        lambda x, norm_weight, *weights: plain_linears(plain_rms_norm(x, norm_weight), *weights),
        (
            normal(2, 6, 24, seed=0, scale=3.0),
            1 + normal(24, seed=1, scale=0.3),
            normal(16, 24, seed=2),
            normal(8, 24, seed=3),
        ),
    ),
    "swiglu_linear": (
        swiglu_linear,
        lambda gate, up, weight: F.linear(plain_swiglu(gate, up), weight),
        (normal(2, 6, 40, seed=0, scale=3.0), normal(2, 6, 40, seed=1), normal(24, 40, seed=2)),
    ),
    "rotary": (
        lambda x: rotary(x, *TABLES),
        lambda x: plain_rotary(x, *(table.to(x.dtype) for table in TABLES)),
        (normal(2, 6, 3, 8, seed=0),),
    ),
}


def run(function: Function, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    grad = normal(*output.shape, seed=9).to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("case", CASES)
def test_equals_plain_in_fp32(case: str) -> None:
    ours, plain, inputs = CASES[case]
    exact = run(plain, tuple(tensor.double() for tensor in inputs))
    for mine, reference in zip(run(ours, inputs), exact, strict=True):
        assert mine.dtype == torch.float32
        # A handful of fp32 roundings (2⁻²⁴ each) and sums of at most 72 terms of like size.
        bound = 32 * 2**-24 * reference.abs().max().item()
        torch.testing.assert_close(mine.double(), reference, rtol=0.0, atol=bound)


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 weights", "fp32 weights"])
@pytest.mark.parametrize("case", CASES)
def test_equals_plain_in_bf16(case: str, mixed: bool) -> None:
    """Each result is within three roundings (2⁻⁹ relative each) of the exact one on the rounded inputs."""
    activations = 2 if case.startswith("swiglu") else 1
    ours, plain, inputs = CASES[case]
    rounded = tuple(tensor.bfloat16() for tensor in inputs)
    given = tuple(w.float() if mixed and i >= activations else w for i, w in enumerate(rounded))
    exact = run(plain, tuple(tensor.double() for tensor in rounded))
    for mine, reference, source in zip(run(ours, given), exact, [rounded[0], *given], strict=True):
        assert mine.dtype == source.dtype
        assert ((mine.double() - reference).norm() / reference.norm()).item() < 3 * 2**-9


def saved_by(function: Callable[[], object]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function()
    return saved


def test_rms_norm_keeps_its_input_only() -> None:
    x, weight = normal(5, 16, seed=0).bfloat16().requires_grad_(), torch.ones(16, requires_grad=True)
    saved = saved_by(lambda: rms_norm(x, weight, EPS))
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), weight.data_ptr()}
    assert sum(t.nbytes for t in saved) == 5 * 16 * 2 + 16 * 4


def test_swiglu_keeps_gate_and_up_only() -> None:
    gate, up = (normal(5, 16, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    saved = saved_by(lambda: swiglu(gate, up))
    assert {t.data_ptr() for t in saved} == {gate.data_ptr(), up.data_ptr()}
    assert sum(t.nbytes for t in saved) == 2 * 5 * 16 * 2


def test_linears_keep_their_input_once_and_no_cast_weight() -> None:
    x = normal(5, 16, seed=0).bfloat16().requires_grad_()
    weights = [normal(8, 16, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    saved = saved_by(lambda: shared_input_linear(x, *weights))
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (x, *weights)]


def test_linears_after_a_norm_or_swiglu_do_not_keep_what_these_give() -> None:
    x, gate, up = (normal(5, 16, seed=seed).bfloat16().requires_grad_() for seed in (0, 1, 2))
    norm_weight = torch.ones(16, requires_grad=True)
    weights = [normal(8, 16, seed=seed).requires_grad_() for seed in (3, 4)]
    saved = saved_by(lambda: normed_linear(x, norm_weight, EPS, *weights))
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (x, norm_weight, *weights)]
    saved = saved_by(lambda: swiglu_linear(gate, up, weights[0]))
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (gate, up, weights[0])]


@pytest.mark.parametrize("mixed", [False, True], ids=["bf16 weights", "fp32 weights"])
def test_linears_after_a_norm_or_swiglu_give_the_bits_of_the_two_apart(mixed: bool) -> None:
    _, _, inputs = CASES["normed_linears"]
    x, *weights = (
        w.bfloat16().to(torch.float32 if mixed and i else torch.bfloat16) for i, w in enumerate(inputs)
    )
    fused, apart = (
        run(normed_linears, (x, *weights)),
        run(
            lambda x, norm_weight, *weights: shared_linears(rms_norm(x, norm_weight, EPS), *weights),
            (x, *weights),
        ),
    )
    assert all(map(torch.equal, fused, apart))
    gate, up, weight = (w.bfloat16() for w in CASES["swiglu_linear"][2])
    weight = weight.float() if mixed else weight
    fused, apart = (
        run(swiglu_linear, (gate, up, weight)),
        run(lambda gate, up, weight: shared_linears(swiglu(gate, up), weight), (gate, up, weight)),
    )
    assert all(map(torch.equal, fused, apart))


def test_linears_compute_only_the_gradients_that_are_wanted() -> None:
    x, frozen, trained = normal(5, 16, seed=0), normal(8, 16, seed=1), normal(8, 16, seed=2).requires_grad_()
    first, second = shared_input_linear(x, frozen, trained)
    (first.sum() + second.sum()).backward()
    assert x.grad is None
    assert frozen.grad is None
    torch.testing.assert_close(trained.grad, x.sum(0).expand(8, 16), rtol=1e-6, atol=1e-6)


def test_rotary_scores_depend_on_distance_alone() -> None:
    """What the rotation is for: ⟨R_i q, R_j k⟩ is a function of i − j."""
    cos, sin = rotary_tables(32, 8, 10000.0, torch.device("cpu"))
    query, key = (rotary(normal(8, seed=seed).expand(1, 32, 1, 8), cos, sin)[0, :, 0] for seed in (0, 1))
    scores = query @ key.t()
    for offset in range(-31, 32):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0.0, atol=1e-5)
    assert scores.diagonal(0)[0] != scores.diagonal(1)[0]


@pytest.mark.parametrize("limit", [1 << 22, 7 * 3], ids=["at once", "by columns"])
def test_a_row_of_the_embedding_has_all_its_tokens_gradients(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 2,000 ones come to 256, as 256 + 1 is rounded to 256."""
    monkeypatch.setattr(functional, "_SUMMED_ELEMENTS", limit)
    weight = torch.randn(7, 5).to(torch.bfloat16).requires_grad_()
    tokens = torch.cat([torch.zeros(2000, dtype=torch.int64), torch.tensor([3, 6, 3])]).view(1, -1)
    found = functional.embedding(tokens, weight)
    assert torch.equal(found, weight[tokens])
    found.backward(torch.ones_like(found))
    assert weight.grad is not None
    assert weight.grad.dtype is torch.bfloat16
    assert weight.grad[:, 0].tolist() == [2000, 0, 0, 2, 0, 0, 1]
    assert torch.equal(weight.grad, weight.grad[:, :1].expand(7, 5))
    with torch.no_grad():
        assert torch.equal(functional.embedding(tokens, weight), weight[tokens])
