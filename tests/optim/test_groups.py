"""optimizer.groups: several methods in one run, each on what its pattern finds."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import call_main
from helpers.methods import OF_MATRICES, refreshed_every
from helpers.runs import KINDS, compose, load_data
from torch import Tensor, nn

from rsotrain.cli import entry
from rsotrain.cli.overrides import check_overrides, normalise
from rsotrain.config.identity import identity, run_name
from rsotrain.config.method import SubspaceConfig
from rsotrain.config.schema import Config
from rsotrain.config.validation import validate
from rsotrain.errors import UserError
from rsotrain.models.build import build_model
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.composite import CompositeOptimizer
from rsotrain.optim.formulas import state_bytes
from rsotrain.optim.torch_optimizers import FOAM
from rsotrain.training.trainer import Trainer

VOCAB = 48
CPU = torch.device("cpu")
MIXTURE = (
    "optimizer.groups=[{pattern: self_attn, optimizer: muon, lr: 0.03}, {pattern: down_proj, optimizer:"
    " galore, rank: 4, update_proj_gap: 2}, {pattern: mlp, optimizer: foam, level: 1}]"
)
LOW_RANK = (
    "optimizer.groups=[{pattern: 'o_proj|down_proj', optimizer: apollo, rank: 4, update_proj_gap: 2, sampler:"
    " {name: srht}}, {pattern: embed_tokens, optimizer: lion, state_dtype: bfloat16}]"
)
RUNS = {
    "adam": ["optimizer=adam", MIXTURE],
    "galore": ["optimizer=galore", "optimizer.update_proj_gap=2", "optimizer.rank=4", LOW_RANK],
    "rso_pca": ["optimizer=rso_pca", "optimizer.update_proj_gap=2", "optimizer.rank=4", LOW_RANK],
    "relora": ["optimizer=relora", "optimizer.merge_every=2", "optimizer.restart_warmup_steps=1", LOW_RANK],
    "int8": ["optimizer=sn", "optimizer.state_dtype=int8", "optimizer.weight_decay=0.1", LOW_RANK],
}


def composed(*more: str) -> Config:
    return compose(normalise(["model=llama_tiny", "precision=fp32", *more]))


def built(config: Config) -> tuple[nn.Module, CompositeOptimizer]:
    model = build_model(config.model, vocab_size=VOCAB, precision=config.precision, device=CPU, seed=0)
    return model, build_optimizer(
        model, config.optimizer, config.sampler, precision=config.precision, seed=5, total_steps=10
    )


def train(model: nn.Module, optimizer: CompositeOptimizer, steps: range) -> dict[str, Tensor]:
    """The weights after these steps, with random gradients that are the same for each model."""
    for step in steps:
        random = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_mixture_is_its_methods_run_by_themselves_to_the_bit() -> None:
    mixed = train(*built(composed(*RUNS["adam"])), range(1, 6))
    low = ["optimizer.rank=4", "optimizer.update_proj_gap=2"]
    own = {
        "self_attn": ["optimizer=muon", "optimizer.lr=0.03"],
        "down_proj": ["optimizer=galore", *low],
        "(gate|up)_proj": ["optimizer=foam", "optimizer.level=1"],
        "norm|embed|head": ["optimizer=adam"],
    }
    compared = []
    for pattern, method in own.items():
        for name, alone in train(*built(composed(*method)), range(1, 6)).items():
            if re.search(pattern, name):
                assert torch.equal(mixed[name], alone), name
                compared.append(name)
    assert sorted(compared) == sorted(mixed)  # each parameter is some method's, and of one alone


EACH = [
    pytest.param(name, marks=[] if name in (*KINDS, "adam8bit") else pytest.mark.slow) for name in OF_MATRICES
]


@pytest.mark.parametrize("method", EACH)
def test_each_method_does_in_a_group_what_it_does_by_itself(method: str) -> None:
    own = [*refreshed_every(method, 2), "optimizer.weight_decay=0.1"]
    if isinstance(compose([f"optimizer={method}"]).optimizer, SubspaceConfig) and method != "apollo_mini":
        own.append("optimizer.rank=4")
    if method == "scale":
        own.append("optimizer.momentum_parameters=[]")
    if method == "adam_mini":  # which a run has from its model
        own.append("optimizer.num_heads=4")
    alone = train(*built(composed(f"optimizer={method}", "optimizer.lr=0.03", *own)), range(1, 6))
    keys = ", ".join(setting.removeprefix("optimizer.").replace("=", ": ") for setting in own)
    group = f"{{pattern: self_attn, optimizer: {method}, lr: 0.03, {keys}}}"
    mixed = train(*built(composed("optimizer=adam", f"optimizer.groups=[{group}]")), range(1, 6))
    of_group = [name for name in mixed if "self_attn" in name]
    assert len(of_group) == 8
    for name in of_group:
        assert torch.equal(mixed[name], alone[name]), name


def trainer(tiny: list[str], cache_dir: Path, *more: str) -> Trainer:
    config = compose(normalise([*tiny, *more]))
    validate(config)
    return Trainer(config, load_data(config, cache_dir))


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_is_the_uninterrupted_run_bitwise(run: str, tiny: list[str], cache_dir: Path) -> None:
    straight = trainer(tiny, cache_dir, *RUNS[run])
    for _ in range(3):
        straight.train_step()
    saved, stream = straight.state_dict(), io.BytesIO()
    torch.save({kind: saved[kind] for kind in ("model", "optimizer")}, stream)
    stream.seek(0)
    resumed = trainer(tiny, cache_dir, *RUNS[run])
    resumed.load_state_dict(torch.load(stream, weights_only=True) | {"trainer": saved["trainer"]})
    for one in (straight, resumed):
        for _ in range(3):
            one.train_step()
    mine, theirs = straight.state_dict(), resumed.state_dict()
    for kind in ("model", "optimizer"):
        for name, tensor in mine[kind].items():
            assert torch.equal(tensor, theirs[kind][name]), name


@pytest.mark.parametrize("run", RUNS)
def test_the_state_is_as_large_as_by_the_formulas(run: str) -> None:
    config = composed(*RUNS[run], f"model.vocab_size={VOCAB}")
    _, optimizer = built(config)
    formula = state_bytes(config, VOCAB)
    assert formula is not None
    assert (formula.total, formula.blocks) == (optimizer.state_bytes(), optimizer.block_state_bytes())
    assert sum(row.state_bytes for row in optimizer.table()) == formula.total


@pytest.mark.parametrize("run", ["adam", "galore", "rso_pca"])
def test_updates_within_the_backward_pass_are_the_same_bitwise(
    run: str, tiny: list[str], cache_dir: Path
) -> None:
    after, within = (
        trainer(tiny, cache_dir, *RUNS[run], f"optimizer.update_in_backward={flag}")
        for flag in ("false", "true")
    )
    for one in (after, within):
        for _ in range(3):
            one.train_step()
    for (name, p), q in zip(after.model.named_parameters(), within.model.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_group_has_its_methods_rates_and_the_runs_decay_and_precision() -> None:
    _, optimizer = built(composed(*RUNS["int8"]))
    table = {row.group: row for row in optimizer.table()}
    apollo, lion = table["group 0: apollo"], table["group 1: lion"]
    assert (apollo.pattern, lion.pattern) == ("o_proj|down_proj", "embed_tokens")
    alone = composed("optimizer=apollo").optimizer
    assert apollo.lr == alone.lr * alone.scale
    by_label = {group.label: group for group in optimizer.groups}
    assert all(group.settings.weight_decay == 0.1 for group in optimizer.methods)
    embedding = by_label[lion.group]
    assert embedding.decay_of("model.embed_tokens.weight") == 0.0
    assert embedding.moments["model.embed_tokens.weight"]["exp_avg"].values.dtype is torch.bfloat16
    assert by_label[apollo.group].keeper.coded


def test_the_metrics_of_bases_are_told_apart() -> None:
    model, optimizer = built(composed(*RUNS["galore"]))
    train(model, optimizer, range(1, 4))
    metrics = optimizer.metrics()
    assert {"subspace/captured_energy", "subspace/captured_energy/group_0"} <= metrics.keys()
    assert not any(key.endswith("group_1") for key in metrics)


REFUSALS: dict[str, tuple[list[str], str]] = {
    "nothing": (
        ["{pattern: nowhere, optimizer: muon}"],
        "'nowhere' matches no parameter; correct the pattern",
    ),
    "taken": (
        ["{pattern: mlp, optimizer: muon}", "{pattern: up_proj, optimizer: foam}"],
        "optimizer.groups[1]: 'up_proj' finds only what is frozen or belongs to a group before it",
    ),
    "vectors": (["{pattern: norm, optimizer: muon}"], "which is not a matrix; narrow the pattern"),
    "modules": (
        ["{pattern: mlp, optimizer: rso}"],
        "optimizer.groups[0]: rso changes the modules of the model, which only the run's own optimizer can",
    ),
    "adapters": (["{pattern: mlp, optimizer: lora}"], "lora changes the modules of the model"),
    "idle": (
        ["{pattern: proj, optimizer: muon}"],
        "optimizer.groups leave optimizer=galore no matrix that optimizer.block_parameters finds; take",
    ),
    "sampler": (
        ["{pattern: mlp, optimizer: muon, sampler: svd}"],
        "optimizer.groups[0]: optimizer=muon has no subspace, so sampler=svd would do nothing",
    ),
    "rank": (["{pattern: mlp, optimizer: apollo, rank: 999}"], "rank=999 is larger"),
    "betas": (["{pattern: mlp, optimizer: foam, betas: [0.9, 1.0]}"], "groups[0]: optimizer.betas: a second"),
    "item": (["7"], "optimizer.groups must be a list of mappings"),
    "no pattern": (["{optimizer: muon}"], "optimizer.groups[0] needs a text as its pattern"),
    "no method": (["{pattern: mlp}"], "optimizer.groups[0] needs a text as its optimizer"),
    "unknown": (["{pattern: mlp, optimizer: moun}"], "optimizer=moun does not exist; did you mean muon?"),
    "no regex": (["{pattern: '(', optimizer: muon}"], "'(' is no regular expression"),
    "key": (["{pattern: mlp, optimizer: foam, levle: 1}"], "optimizer.groups[0]: foam has no setting levle"),
    "type": (["{pattern: mlp, optimizer: foam, level: much}"], "level='much' of foam"),
    "range": (
        ["{pattern: mlp, optimizer: foam, level: 99}"],
        "optimizer.groups[0]: level=99 must be at most 10",
    ),
    "rest": (
        ["{pattern: mlp, optimizer: foam, rest: lion}"],
        "optimizer.groups[0] has rest, which a run has once, as optimizer.rest; leave it out",
    ),
    "of the model": (["{pattern: mlp, optimizer: adam_mini}"], "adam_mini needs num_heads=…"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_group_that_cannot_be_is_refused(
    case: str, tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    groups, sentence = REFUSALS[case]
    given = [f"optimizer.groups=[{', '.join(groups)}]", "optimizer.rank=4", *tiny]
    assert call_main(entry, ["optimizer=galore", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_run_with_groups_is_planned_and_trained_alike(
    tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [*RUNS["galore"], *tiny, "device=cpu", "steps=3"]
    assert call_main(entry, ["mode=plan", *own]) == 0
    assert "warning" not in capsys.readouterr().out
    assert call_main(entry, own) == 0
    (log,) = tmp_path.glob("outputs/*/train.log")
    assert "│ group 1:" in log.read_text()
    capsys.readouterr()
    assert call_main(entry, own) == 0
    assert "is finished already" in capsys.readouterr().out


def test_groups_are_a_part_of_what_a_run_is_where_there_are_some() -> None:
    plain, mixed = composed("optimizer=adam"), composed(*RUNS["adam"])
    assert "optimizer.groups" not in identity(plain)
    assert "optimizer.groups" in identity(mixed)
    assert run_name(mixed).startswith("llama_tiny-adam+muon+galore+foam-seed0-")
    assert run_name(mixed) != run_name(composed(*RUNS["adam"], "optimizer.groups.2.level=2"))


def test_a_key_of_one_group_can_be_set_and_swept() -> None:
    given = [*RUNS["adam"], "optimizer.groups.1.rank=8", "optimizer.groups.2.lr=0.5"]
    check_overrides(normalise(given))
    groups = composed(*given).optimizer.groups
    assert groups[1]["rank"] == 8
    assert groups[2] == {"pattern": "mlp", "optimizer": "foam", "level": 1, "lr": 0.5}
    with pytest.raises(UserError, match="has no parts of a name"):
        check_overrides(["optimizer.groups.lr=1"])


def test_a_torch_optimizer_has_groups_too() -> None:
    def optimizer(**more: Any) -> FOAM:
        model = build_model(
            composed().model, vocab_size=VOCAB, precision=composed().precision, device=CPU, seed=0
        )
        return FOAM(model, groups=[{"pattern": "self_attn", "optimizer": "muon", **more}])

    one = optimizer(lr=0.3, scale=0.5)
    assert [group["lr"] for group in one.param_groups][1] == 0.15
    with pytest.raises(UserError, match="muon has no setting rank"):
        optimizer(rank=3)


def test_a_method_of_another_name_has_the_same_updates() -> None:
    """The label of a group is for tables alone: rounding and bases are seeded by the parameters' names."""
    run = ["optimizer=adam", "optimizer.state_dtype=bfloat16"]
    one, other = composed(*run, MIXTURE), composed(*run, MIXTURE)
    other = replace(other, optimizer=replace(other.optimizer, name="renamed"))
    left, right = (train(*built(config), range(1, 4)) for config in (one, other))
    assert all(torch.equal(left[name], right[name]) for name in left)
