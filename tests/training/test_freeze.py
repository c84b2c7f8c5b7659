"""Frozen parameters: no gradient, no state, no change, whatever trains the others."""

import re
from pathlib import Path

import pytest
import torch
from helpers.methods import refreshed_every
from helpers.runs import KINDS, OPTIMIZERS, compose, trainer
from safetensors.torch import load_file

from rsotrain.checkpoints.files import load_tensors
from rsotrain.cli.dispatch import run_mode
from rsotrain.errors import UserError
from rsotrain.optim.formulas import state_bytes
from rsotrain.planner.plan import make_plan
from rsotrain.running.mode import train
from rsotrain.training.composition import check_composition

# what is frozen, as lists of patterns: parts of the blocks, all of them, what is outside, the first layers
FROZEN = {
    "parts": [r"\.q_proj\.", r"layers\.0\.mlp"],
    "blocks": [r"_proj\.weight$"],
    "outside": ["embed_tokens", "norm", "lm_head"],
    "first": ["embed_tokens", r"layers\.0\."],
}


def freeze(patterns: list[str]) -> str:
    return "model.freeze=[" + ",".join(f"'{p}'" for p in patterns) + "]"


def is_frozen(name: str, patterns: list[str]) -> bool:
    return any(re.search(p, name) for p in patterns)


# every method with parts of each kind of matrix frozen; the other patterns with one method of each kind
FEW = (*KINDS, "scale")  # which has embedding and head among its own matrices
LATER = {what: pytest.mark.slow if what == "parts" else pytest.mark.long for what in FROZEN}
PAIRS = [
    pytest.param(optimizer, what, marks=[] if optimizer in FEW else LATER[what])
    for optimizer in OPTIMIZERS
    for what in FROZEN
]


@pytest.mark.parametrize(("optimizer", "what"), PAIRS)
def test_frozen_parameters_stay_and_cost_nothing(
    optimizer: str, what: str, tiny: list[str], cache_dir: Path
) -> None:
    patterns = FROZEN[what]
    gap = refreshed_every(optimizer, 2)
    own = [*tiny, f"optimizer={optimizer}", "optimizer.weight_decay=0.1", *gap, freeze(patterns)]
    made = trainer(own, cache_dir)
    named = dict(made.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    for _ in range(3):
        made.train_step()
        assert all(p.grad is None for p in named.values())
    frozen = made.optimizer.parameter_groups.frozen
    by_method = {name for name in frozen if not is_frozen(name, patterns)}  # LoRA's weights
    assert not by_method or optimizer in ("lora", "relora")
    for name, parameter in named.items():
        still = is_frozen(name, patterns) or (name in by_method and optimizer == "lora")  # ReLoRA merges
        assert torch.equal(parameter, before[name]) == still, name
    state = made.optimizer.state_dict()
    assert not any(key.rpartition(".")[0] in frozen for key in state)
    trained = sum(p.numel() for name, p in named.items() if name not in frozen)
    rows = made.optimizer.table()
    assert sum(row.num_elements for row in rows if row.group != "frozen") == trained
    assert made.optimizer.state_bytes() == state_bytes(made.config, made.vocab_size).total


def test_a_frozen_part_leaves_the_gradients_of_the_others_as_they_are(
    tiny: list[str], cache_dir: Path
) -> None:
    free, part = (
        trainer([*tiny, "optimizer=adam"], cache_dir),
        trainer([*tiny, "optimizer=adam", freeze(FROZEN["first"])], cache_dir),
    )
    ((inputs, targets),) = free.micro_batches()
    for made in (free, part):
        made.forward(inputs, targets).backward()
    whole = dict(free.model.named_parameters())
    for name, parameter in part.model.named_parameters():
        if is_frozen(name, FROZEN["first"]):
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, whole[name].grad), name  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "galore", "rso_pca"])
def test_a_plan_knows_what_is_frozen(optimizer: str, tiny: list[str], cache_dir: Path) -> None:
    own = [
        *tiny, f"optimizer={optimizer}", freeze(FROZEN["parts"]), "device=cpu", "micro_batch_size=2",
    ]  # fmt: skip
    made = trainer(own, cache_dir)
    made.train_step()
    planned = make_plan(compose([*own, "mode=plan"]), gpus=False)
    measured = made.memory()
    assert planned.gradients.total == measured["memory/gradients_bytes"]
    assert planned.optimizer_state.total == measured["memory/optimizer_state_bytes"]
    assert planned.formula_state.total == planned.optimizer_state.total
    assert planned.saved_activations == measured["memory/saved_activations_bytes"]
    free = make_plan(compose([*tiny, f"optimizer={optimizer}", "mode=plan", "device=cpu"]), gpus=False)
    assert planned.optimizer_state.total < free.optimizer_state.total
    assert planned.gradients.total < free.gradients.total


@pytest.mark.parametrize("optimizer", ["adam", "rso_pca", "galore"])
@pytest.mark.parametrize("how", ["activation_checkpointing=mlp", "activation_checkpointing=block"])
def test_recomputing_goes_with_frozen_parameters(
    optimizer: str, how: str, tiny: list[str], cache_dir: Path
) -> None:
    own = [*tiny, f"optimizer={optimizer}", freeze(FROZEN["first"])]
    kept, recomputed = trainer(own, cache_dir), trainer([*own, how], cache_dir)
    for _ in range(2):
        assert kept.train_step() == recomputed.train_step()


@pytest.mark.parametrize("optimizer", ["galore", "rso_pca", "muon"])
def test_a_resumed_run_with_frozen_parameters_is_bitwise_the_same(
    optimizer: str, tiny: list[str], cache_dir: Path
) -> None:
    own = [*tiny, f"optimizer={optimizer}", freeze(FROZEN["parts"])]
    straight, first, second = (trainer(own, cache_dir) for _ in range(3))
    results = [straight.train_step() for _ in range(4)]
    for _ in range(2):
        first.train_step()
    second.load_state_dict(first.state_dict())
    assert [second.train_step() for _ in range(2)] == results[2:]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["nothing"], "model.freeze: 'nothing' matches no parameter .names look like 'model.embed_tokens"),
        (["norm", "(up"], r"model.freeze holds '\(up', which is no regular expression"),
        (["."], "leaves nothing to train"),
    ],
)
def test_patterns_that_make_no_sense_get_a_sentence(
    patterns: list[str], message: str, tiny: list[str]
) -> None:
    with pytest.raises(UserError, match=message):
        check_composition(compose([*tiny, freeze(patterns)]))


def test_a_tied_weight_goes_by_its_first_name(tiny: list[str], cache_dir: Path) -> None:
    tied = [*tiny, "optimizer=adam", "model.tie_word_embeddings=true"]
    with pytest.raises(UserError, match="'lm_head' matches no parameter"):
        check_composition(compose([*tied, "model.freeze=[lm_head]"]))
    made = trainer([*tied, "model.freeze=[embed_tokens]"], cache_dir)
    before = made.model.lm_head.weight.detach().clone()
    made.train_step()
    assert torch.equal(made.model.lm_head.weight, before)


@pytest.mark.slow
def test_a_run_with_frozen_parameters_is_exported_whole(
    tiny: list[str], tmp_path: Path, cache_dir: Path
) -> None:
    own = ["optimizer=rso_pca", "steps=2", freeze(FROZEN["parts"]), f"output_dir={tmp_path}", "run_name=r"]
    chosen = dict(o.split("=", 1) for o in [*tiny, *own])
    command = [f"{key}={value}" for key, value in chosen.items()]
    train(compose(command))
    folder = tmp_path / "exported"
    run_mode(compose([*tiny, "mode=export", f"checkpoint.path={tmp_path / 'r'}", f"export.path={folder}"]))
    exported = load_file(folder / "model.safetensors")
    saved = load_tensors(tmp_path / "r/checkpoints/step_00000002", "model")
    start = dict(trainer([*tiny, "optimizer=adam"], cache_dir).model.named_parameters())
    assert exported.keys() == saved.keys() == start.keys()
    for name, weight in exported.items():
        assert torch.equal(weight, saved[name])
        assert torch.equal(weight, start[name]) == is_frozen(name, FROZEN["parts"]), name
