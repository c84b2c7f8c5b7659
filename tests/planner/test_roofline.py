"""What a step asks of a GPU, as counted and as estimated; that the estimates are true needs a GPU."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers.runs import compose
from torch.nn.functional import scaled_dot_product_attention

from rsotrain.instruments.phases import Phase
from rsotrain.instruments.work import Bound, WorkCounter
from rsotrain.planner import plan
from rsotrain.planner.cards import CARDS
from rsotrain.planner.fake_run import FakeRun
from rsotrain.planner.plan import Plan, make_plan
from rsotrain.planner.roofline import LAUNCHES, PRODUCTS
from rsotrain.planner.show import print_plan

SMALL = ["model=llama_tiny", "tokenizer.vocab_size=1000", "seq_len=64", "steps=1000"]


def counted(function: object) -> Counter[Bound]:
    """FLOPs of a call by what bounds them."""
    assert callable(function)
    with WorkCounter() as counter:
        function()
    found: Counter[Bound] = Counter()
    for operation, number in counter.sections[0][1].items():
        found[operation.bound] += number * operation.flops
    return found


def test_flops_of_products_are_counted_by_dtype() -> None:
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    assert counted(lambda: a @ b)[Bound.float32] == 2 * 3 * 5 * 7
    assert counted(lambda: torch.ones(3, 7).addmm_(a, b))[Bound.float32] == 2 * 3 * 5 * 7
    assert counted(lambda: a.bfloat16() @ b.bfloat16())[Bound.bfloat16] == 2 * 3 * 5 * 7
    batches = torch.ones(2, 3, 5, dtype=torch.float64)
    assert counted(lambda: batches @ batches.mT)[Bound.float64] == 2 * 2 * 3 * 5 * 3


def test_causal_attention_has_half_the_flops() -> None:
    q = torch.ones(2, 4, 16, 8, requires_grad=True)
    whole = counted(lambda: scaled_dot_product_attention(q, q, q))
    causal = counted(lambda: scaled_dot_product_attention(q, q, q, is_causal=True))
    assert whole[Bound.attention] == 4 * 2 * 4 * 16 * 16 * 8 == 2 * causal[Bound.attention]
    out = scaled_dot_product_attention(q, q, q).sum()
    assert counted(out.backward)[Bound.attention] == 10 * 2 * 4 * 16 * 16 * 8


def test_bytes_are_those_read_and_written() -> None:
    a, b = torch.ones(64), torch.ones(64)
    for function, nbytes in (
        (lambda: a + b, 3 * 256),
        (lambda: a.add_(b), 3 * 256),
        (lambda: a.copy_(b), 2 * 256),
        (lambda: torch.zeros_like(a), 256),
        (lambda: a[:1].expand(64) + b, 4 + 2 * 256),  # what repeats is read once
        (lambda: a.view(8, 8), 0),
        (lambda: torch.add(a, b, out=torch.empty(64)), 3 * 256),
    ):
        with WorkCounter() as counter:
            function()
        assert sum(n * o.nbytes for o, n in counter.sections[0][1].items()) == nbytes


def test_the_products_of_a_step_are_those_of_the_models_flops() -> None:
    """RSO has fewer, as it has no full gradient. Of attention's seven products the backward pass makes one,
    the scores, again, which the model's count leaves out."""
    flops: dict[str, Counter[Bound]] = {}
    for optimizer in ("adam", "rso"):
        config = compose([*SMALL, f"optimizer={optimizer}", "batch_size=4", "micro_batch_size=4"])
        with FakeRun(config, "cuda") as run:
            run.step(2, counter := WorkCounter())
            expected = run.trainer.flops_per_token * 4 * 64
        found = flops[optimizer] = Counter()
        for phase in (Phase.forward, Phase.backward):
            for operation, number in counter.of_step(1)[phase].items():
                found[operation.bound] += number * operation.flops
    attention = flops["adam"][Bound.attention]
    assert flops["adam"].total() - attention // 7 == expected
    assert flops["rso"][Bound.attention] == attention
    assert flops["rso"].total() < flops["adam"].total()


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    monkeypatch.setattr(plan, "_fits", lambda *_: [])  # takes longer than all else

    def made(*overrides: str) -> Plan:
        return make_plan(compose([*SMALL, "mode=plan", *overrides]))

    return made


def test_micro_batches_take_time_each(plan_of: Callable[..., Plan]) -> None:
    one, four = (plan_of("optimizer=adam", "micro_batch_size=2", f"batch_size={size}") for size in (2, 8))
    for first, last in zip(one.speeds, four.speeds, strict=True):
        # the update is made once, and one micro-batch has no sum of gradients
        passes = [speed.phases["forward"] + speed.phases["backward"] for speed in (first, last)]
        assert 3.9 < passes[1] / passes[0] < 5
        assert last.phases["optimizer step"] < 2 * first.phases["optimizer step"]


@pytest.mark.slow
def test_a_refresh_counts_as_its_average(plan_of: Callable[..., Plan]) -> None:
    """Twice as often is twice as much, and staggered as much as all at once."""
    often, seldom, staggered = (
        plan_of("optimizer=galore", f"optimizer.update_proj_gap={gap}", *more).speeds[-1]
        for gap, more in ((10, ()), (20, ()), (10, ("optimizer.staggered=true",)))
    )
    assert often.phases["refresh"] == pytest.approx(2 * seldom.phases["refresh"])
    assert staggered.phases["refresh"] == pytest.approx(often.phases["refresh"], rel=0.05)


def test_ranks_send_and_small_models_wait_for_the_host(
    plan_of: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    sharded = plan_of(
        "optimizer=adam",
        "parallelism=fsdp",
        "parallelism.world_size=16",
        "batch_size=32",
        "micro_batch_size=1",
    )
    assert [speed.gpu for speed in sharded.speeds] == [card.name for card in CARDS]
    assert all(speed.bounds["communication"] > 0 for speed in sharded.speeds)
    assert all(speed.bounds[LAUNCHES] > speed.bounds[PRODUCTS] for speed in sharded.speeds)
    print_plan(sharded)
    shown = capsys.readouterr().out
    for text in ("A step to expect", "RTX 4090", "H100", "assumed, not measured", "between ranks"):
        assert text in shown
    assert max(len(line) for line in shown.splitlines() if "│" in line) <= 80
    assert sharded.as_dict()["speeds"][0]["gpu"] == CARDS[0].name


def test_a_plan_for_a_cpu_has_no_speed(plan_of: Callable[..., Plan]) -> None:
    assert plan_of("optimizer=adam", "device=cpu", "micro_batch_size=2").speeds == []
