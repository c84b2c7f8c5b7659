"""The chunked LM head and loss against the plain one."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.instruments.devices import planning_for
from rsotrain.models import loss as loss_module
from rsotrain.models.loss import linear_cross_entropy

VOCAB, FEATURES = 211, 24


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, several softmax blocks in each and several blocks of the head, all with a remainder."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(loss_module, "_GPU_LOGITS_BYTES", 4 * VOCAB * 16)
    for block in ("_CPU_BLOCK_BYTES", "_GPU_BLOCK_BYTES"):
        monkeypatch.setattr(loss_module, block, 4 * VOCAB * 5)


def problem(num_tokens: int = 37) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, FEATURES, generator=generator)
    weight = torch.randn(VOCAB, FEATURES, generator=generator) / 3
    targets = torch.randint(VOCAB, (num_tokens,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden, weight, targets


def gradients(function, hidden, weight, targets, factor=1.0):  # type: ignore[no-untyped-def]
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(hidden, weight, targets)
    (loss * factor).backward()
    return loss.detach(), hidden.grad, weight.grad


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("factor", [1.0, 0.037])
def test_equals_plain_loss_in_fp32(factor: float, kind: str) -> None:
    hidden, weight, targets = problem()
    # Same numbers in another order of summation: fp32 rounding of sums of about 30 to 200 terms.
    with planning_for(kind):
        found = gradients(linear_cross_entropy, hidden, weight, targets, factor)
    for ours, theirs in zip(found, gradients(plain, hidden, weight, targets, factor), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_all_targets_of_a_chunk_ignored() -> None:
    hidden, weight, targets = problem()
    targets[16:32] = IGNORE_INDEX
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    for mine, theirs in zip(ours, gradients(plain, hidden, weight, targets), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not ours[1][16:32].any()


def test_everything_ignored_gives_zero() -> None:
    hidden, weight, targets = problem()
    for value in gradients(linear_cross_entropy, hidden, weight, torch.full_like(targets, IGNORE_INDEX)):
        assert not value.any()


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, targets = problem()
    ours = gradients(linear_cross_entropy, hidden * 1e4, weight, targets)
    theirs = gradients(plain, hidden * 1e4, weight, targets)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.isfinite().all()
        # Logits of 1e5 carry an fp32 rounding of 1e-2, which decides near-ties of the softmax.
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=other.abs().max().item() * 1e-3)


def test_bf16_compute_is_as_exact_as_the_plain_loss() -> None:
    """Against float64, errors stay within 1.5 times those of the plain bf16 loss, and the head's gradient
    (summed over chunks in fp32) below its one rounding per partial product: 2⁻⁸."""
    hidden, weight, targets = problem(256)
    hidden = hidden.bfloat16()
    weight = weight.bfloat16().float()
    exact = gradients(plain, hidden.double(), weight.double(), targets)
    ours = gradients(linear_cross_entropy, hidden, weight, targets)
    theirs = gradients(plain, hidden, weight, targets)
    assert [tensor.dtype for tensor in ours] == [torch.float32, torch.bfloat16, torch.float32]

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        return ((value.double() - reference).norm() / reference.norm()).item()

    for mine, other, reference in zip(ours, theirs, exact, strict=True):
        assert error(mine, reference) <= 1.5 * error(other, reference) + 1e-6
    assert error(ours[2], exact[2]) < 2**-8


def test_the_factor_of_the_loss_is_not_rounded_to_bf16() -> None:
    hidden, weight, targets = problem(256)
    hidden = hidden.bfloat16()
    factor = 1 / 1837  # in bf16 0.2 % more
    for ours, exact in zip(
        gradients(linear_cross_entropy, hidden, weight.bfloat16(), targets, factor)[1:],
        gradients(linear_cross_entropy, hidden, weight.bfloat16(), targets)[1:],
        strict=True,
    ):
        # entries are rounded either way, which averages out
        ratio = (ours.double() * exact.double()).sum() / exact.double().square().sum()
        assert ratio == pytest.approx(factor, rel=2e-4)


def with_z_loss(z_loss: float):  # type: ignore[no-untyped-def]
    """Σ −log softmax(logits)[target] + z_loss·(log Σ exp(logits))² over the targets, in float64."""

    def reference(hidden, weight, targets):  # type: ignore[no-untyped-def]
        logits = hidden.double() @ weight.double().T
        log_z = logits.logsumexp(1)
        valid = targets != IGNORE_INDEX
        logit = logits.gather(1, targets.where(valid, 0).unsqueeze(1)).squeeze(1)
        return ((log_z - logit + z_loss * log_z**2) * valid).sum()

    return reference


@pytest.mark.parametrize("z_loss", [1e-4, 0.3])
def test_the_z_loss_is_in_the_gradients_and_not_in_the_value(z_loss: float) -> None:
    hidden, weight, targets = problem()
    value, *ours = gradients(partial(linear_cross_entropy, z_loss=z_loss), hidden, weight, targets)
    assert torch.equal(value, linear_cross_entropy(hidden, weight, targets))
    _, *exact = gradients(with_z_loss(z_loss), hidden, weight, targets)
    # fp32 rounding of sums of about 30 to 200 terms, of which those of the z-loss are up to 3 times as large
    for mine, reference in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, reference.float(), rtol=1e-5, atol=3e-5)
    _, *without = gradients(linear_cross_entropy, hidden, weight, targets)
    assert not any(torch.allclose(a, b, rtol=1e-4) for a, b in zip(ours, without, strict=True))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, z_loss=z_loss), value)


def test_a_target_that_is_neither_a_token_nor_ignored_is_an_error() -> None:
    for wrong in (-1, VOCAB):
        hidden, weight, targets = problem()
        targets[20] = wrong
        with pytest.raises(RuntimeError, match="out of bounds"):
            linear_cross_entropy(hidden, weight, targets)


def test_gradients_only_where_wanted() -> None:
    hidden, weight, targets = problem()
    head = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, head, targets).backward()
    trunk = hidden.clone().requires_grad_()
    linear_cross_entropy(trunk, weight, targets).backward()
    _, grad_hidden, grad_weight = gradients(linear_cross_entropy, hidden, weight, targets)
    assert torch.equal(head.grad, grad_weight)
    assert torch.equal(trunk.grad, grad_hidden)


def test_evaluation_gives_the_training_loss_and_computes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = problem()
    weight.requires_grad_()
    training = linear_cross_entropy(hidden, weight, targets)
    monkeypatch.delattr(loss_module, "_WeightGradient")
    with torch.no_grad():
        evaluation = linear_cross_entropy(hidden, weight, targets)
    assert not evaluation.requires_grad
    assert torch.equal(training, evaluation)


def test_second_backward_is_refused() -> None:
    hidden, weight, targets = problem()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_no_buffer_of_all_logits(z_loss: float) -> None:
    """Every tensor made on the way is smaller than (tokens, vocabulary)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    num_tokens = 320
    hidden, weight, targets = problem(num_tokens)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        gradients(partial(linear_cross_entropy, z_loss=z_loss), hidden, weight, targets)
    assert largest == max(num_tokens * FEATURES, VOCAB * FEATURES) < num_tokens * VOCAB
