"""The recipes of conf/experiment against what the papers published; each composes, plans and trains."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import ROOT, call_main
from helpers.runs import compose, load_data

from rsotrain.cli import entry as cli
from rsotrain.config.keys import flatten, plain
from rsotrain.config.methods import LoRAConfig, ReLoRAConfig, SubspaceConfig
from rsotrain.config.schema import Config, Mode
from rsotrain.config.validation import validate
from rsotrain.data.build import Data
from rsotrain.planner.plan import make_plan
from rsotrain.training.composition import check_composition
from rsotrain.training.trainer import Trainer

# What all the papers' tables share (arXiv 2403.03507), then by size.
PROTOCOL = {
    "data.name": "c4", "data.packing": "padded", "data.streaming": True, "tokenizer.name": "t5",
    "batch_size": 512, "seq_len": 256, "precision": "bf16", "lr_scheduler.name": "cosine",
    "lr_scheduler.warmup_fraction": 0.1, "lr_scheduler.warmup_steps": None, "lr_scheduler.min_ratio": 0.1,
    "optimizer.weight_decay": 0.0, "optimizer.betas": [0.9, 0.999], "evaluation.max_tokens": 10_000_000,
}  # fmt: skip
STEPS = {"60m": 10_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}
PARAMETERS = {
    "60m": 58_073_600, "130m": 134_105_856, "350m": 367_969_280, "1b": 1_339_082_752, "7b": 6_738_415_616,
}  # fmt: skip
CLIPPED = ("7b",)  # by the protocol; some methods clip at every size
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # GaLore's

RANKED = ("alice", "fira", "galore", "i3s", "lora", "relora")  # with GaLore's ranks

# Methods with a recipe -> sizes; published settings of the method, then of single recipes. A rate or a rank
# that is not here was not published.
SIZES = {
    "adam": "60m 130m 350m 1b 7b", "alice": "60m 130m 350m 1b", "apollo": "60m 130m 350m 1b 7b",
    "apollo_mini": "60m 130m 350m 1b 7b",
    "fira": "60m 130m 350m 1b", "foam": "60m 130m 350m 1b", "galore": "60m 130m 350m 1b 7b",
    "i3s": "60m 130m 350m 1b", "lora": "60m 130m 350m 1b", "racs": "60m 130m 350m 1b",
    "relora": "60m 130m 350m 1b", "scale": "60m 130m 350m 1b 7b",
    "muon": "60m 130m 350m 1b", "osd": "60m 350m 1b 7b", "rso": "60m 130m 350m 1b 7b", "sn": "1b",
    "sn_sm": "60m 1b",
}  # fmt: skip
GALORE = {"optimizer.lr": 0.01, "optimizer.scale": 0.25, "optimizer.update_proj_gap": 200}
APOLLO = {"optimizer.lr": 0.01, "optimizer.update_proj_gap": 200, "optimizer.eps": 1e-6}
# of ReLoRA's code (arXiv 2307.05695), as the tables do not say
LORA = {"sampler.name": "none", "optimizer.lr": 0.001, "optimizer.scale": 1.0, "optimizer.alpha": 32.0}
RELORA = {
    "optimizer.restart_warmup_steps": 100, "optimizer.pruning": "magnitude", "optimizer.prune_ratio": 0.99,
}  # fmt: skip
OSD = {
    "sampler.name": "online_pca", "sampler.lr": 0.005, "sampler.penalty": 0.1, "optimizer.scale": 0.25,
    "optimizer.rank": 512, "optimizer.update_proj_gap": 1, "grad_clip": 1.0, "steps": 10_000,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "adam": {"sampler.name": "none", "optimizer.scale": 1.0},  # one rate for all weights
    "alice": {
        "optimizer.lr": 0.02, "optimizer.scale": 0.3, "optimizer.update_proj_gap": 200,
        "optimizer.tracking": 0.999, "optimizer.compensation": 0.4, "optimizer.subspace_betas": [0.9, 0.9],
        "optimizer.max_growth": 1.01, "sampler.name": "switching", "sampler.leading": 40,
    },
    "apollo": APOLLO | {"sampler.name": "gaussian", "optimizer.rank": 0.25},
    "apollo_mini": APOLLO | {"optimizer.rank": 1, "optimizer.per_tensor": True},
    "fira": GALORE
    | {"sampler.name": "svd", "optimizer.max_growth": 1.01, "optimizer.residual_at_lr": True},
    "foam": {
        "optimizer.lr": 0.01, "optimizer.scale": 0.25, "optimizer.betas": [0.9, 0.95], "optimizer.level": 2,
    },
    "galore": GALORE | {"sampler.name": "svd"},
    "i3s": GALORE | {"sampler.name": "importance"},
    "lora": LORA,
    "muon": {"sampler.name": "none"},
    "osd": OSD,
    "racs": {
        "optimizer.scale": 0.05, "optimizer.scale_decay": 0.9, "optimizer.iterations": 5,
        "optimizer.max_growth": 1.01,
    },
    "relora": LORA | RELORA,
    "rso": {"sampler.name": "haar"},
    "scale": {"optimizer.lr": 0.001, "optimizer.scale": 1.0, "optimizer.momentum": 0.9},
    "sn": {"sampler.name": "none", "optimizer.subset_size": None},
    "sn_sm": {"sampler.name": "svd", "optimizer.update_proj_gap": 100, "optimizer.subset_size": None},
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "adam_60m": {"optimizer.lr": 0.005},
    "fira_1b": {"optimizer.scale": 0.0625},
    "galore_7b": {"optimizer.lr": 0.005, "optimizer.update_proj_gap": 500},
    "osd_60m": {"optimizer.lr": 0.01, "sampler.solver": "adam"},
    "osd_350m": {"optimizer.lr": 0.001},
    "osd_1b": {"optimizer.lr": 0.001},
    "osd_7b": {"sampler.solver": "sgd"},
    "scale_60m": {"steps": 11_000},
    "scale_1b": {"optimizer.scale": 0.2},
    "scale_7b": {"optimizer.scale": 0.1},
    "sn_sm_60m": {"optimizer.rank": 128, "grad_clip": 1.0},
}
ADAM_GRID = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4)
NAMES = [f"{method}_{size}" for method, sizes in SIZES.items() for size in sizes.split()]
EACH = [pytest.param(name, marks=[] if name.endswith("_60m") else pytest.mark.slow) for name in NAMES]
OWN = {"finetune_sft"}  # experiments of ours, after no paper

TINY = [
    "model=llama_tiny", "model.vocab_size=null", "data=embedded", "tokenizer=trained",
    "tokenizer.vocab_size=1024", "batch_size=4", "micro_batch_size=2", "seq_len=32", "steps=3", "device=cpu",
]  # fmt: skip


@cache
def recipe(name: str) -> Config:
    return compose([f"experiment={name}"])


@cache
def tiny() -> Config:
    return compose(["experiment=adam_60m", *TINY])


def settings(config: Config) -> dict[str, Any]:
    return dict(flatten(plain(config)))


def published(name: str) -> dict[str, Any]:
    method, size = name.rsplit("_", 1)
    result = PROTOCOL | {"optimizer.name": method, "model.name": f"llama_{size}", "steps": STEPS[size]}
    result |= {"grad_clip": 1.0} if size in CLIPPED else {}
    result |= {"optimizer.rank": RANKS[size]} if method in RANKED else {}
    if method == "relora":
        result |= {"optimizer.merge_every": STEPS[size] // 4}
    return result | METHODS[method] | RECIPES.get(name, {})


def test_every_published_row_has_its_recipe_and_its_comment() -> None:
    files = {path.stem: path for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    recipes = {name for name in files if name.rsplit("_", 1)[-1] in STEPS}
    assert recipes == set(NAMES)
    assert files.keys() >= OWN
    for name in recipes:
        comment = " ".join(line for line in files[name].read_text().splitlines() if line.startswith("# "))
        assert "arXiv 2" in comment, name
    assert set(RECIPES) <= recipes


@pytest.mark.parametrize("name", EACH)
def test_a_recipe_is_what_was_published(name: str) -> None:
    config = recipe(name)
    validate(config)
    check_composition(config)  # on the meta device
    found = settings(config)
    wanted = published(name)
    assert {key: found[key] for key in wanted} == wanted
    if found["optimizer.name"] in ("adam", "muon"):
        assert found["optimizer.lr"] in ADAM_GRID
        assert found["optimizer.lr"] <= 1e-3 or config.model.name in ("llama_60m", "llama_130m")
    clips = found["optimizer.name"] in ("osd", "sn", "sn_sm") or name.endswith(CLIPPED)
    assert (found["grad_clip"] is not None) == clips


@pytest.mark.parametrize("overrides", [["optimizer.rank=64"], ["data=embedded", "tokenizer=trained"]])
def test_the_command_line_wins_over_a_recipe(overrides: list[str]) -> None:
    as_published = settings(recipe("galore_60m"))
    changed = compose(["experiment=galore_60m", *overrides])
    validate(changed)
    found = settings(changed)
    groups = {o.split("=")[0] for o in overrides}
    assert found != as_published
    for key in as_published:
        if key not in groups and key.split(".")[0] not in groups:
            assert found[key] == as_published[key], key
    for override in overrides:
        key, value = override.split("=")
        assert str(found.get(key, found.get(f"{key}.name"))) == value
    assert found["data.packing"] == "padded"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["experiment=galore_60m", "optimizer=adam"],
            "experiment=galore_60m sets optimizer.rank, which optimizer=adam does not have;"
            " take experiment=adam_60m or leave optimizer=adam out",
        ),
        (
            ["experiment=galore_60m", "optimizer=sn"],  # sn has no recipe of that size
            "experiment=galore_60m sets optimizer.rank, which optimizer=sn does not have;"
            " leave optimizer=sn out",
        ),
        (
            ["experiment=osd_7b", "sampler=haar"],
            "experiment=osd_7b sets sampler.solver, which sampler=haar does not have; leave sampler=haar out",
        ),
        (
            ["experiment=osd_7b", "optimizer=galore"],
            "experiment=osd_7b sets sampler.solver, which sampler=svd refuses"
            " (Invalid value 'sgd', expected one of [gram, full]);"
            " take experiment=galore_7b or leave optimizer=galore out",
        ),
        (
            ["experiment=finetune_sft", "data=c4"],
            "experiment=finetune_sft sets data.validation_fraction, which data=c4 does not have;"
            " leave data=c4 out",
        ),
        (
            ["tuned=galore", "optimizer=adam"],
            "tuned=galore sets optimizer.update_proj_gap, which optimizer=adam does not have;"
            " take tuned=adam or leave optimizer=adam out",
        ),
        (
            ["experiment=adam_60m", "tuned=galore"],
            "tuned=galore sets optimizer.update_proj_gap, which optimizer=adam does not have;"
            " leave tuned=galore out",
        ),
        (
            ["-m", "experiment=galore_60m", "optimizer=adam,muon"],
            "experiment=galore_60m sets optimizer.rank, which optimizer=adam does not have;"
            " leave experiment=galore_60m out",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_choice_without_the_recipes_keys_gets_a_sentence(
    overrides: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_main(cli, ["mode=plan", *overrides]) == 2
    assert capsys.readouterr().err == f"rsotrain: {sentence}\n"


def test_a_wrong_key_in_a_recipe_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\noptimizer: {rnak: 3}\n")
    assert call_main(cli, ["--config-dir", str(tmp_path), "experiment=mine"]) == 2
    assert capsys.readouterr().err.startswith(
        "rsotrain: experiment/mine.yaml: unknown key optimizer.rnak; did you mean optimizer.rank"
    )


@pytest.mark.parametrize("name", ["osd_60m", "osd_350m", "osd_1b"])
@pytest.mark.parametrize("override", ["sampler=svd", "optimizer=galore"])
def test_a_recipe_of_osd_takes_another_basis(name: str, override: str) -> None:
    config = compose([f"experiment={name}", override])
    validate(config)
    check_composition(config)
    assert (config.sampler.name, config.steps) == ("svd", 10_000)


@pytest.fixture(scope="module")
def data(cache_dir: Path) -> Data:
    """What all the shrunken recipes read."""
    return load_data(tiny(), cache_dir)


def shrunken(name: str) -> Config:
    """The recipe on the embedded corpus and a model of width 64, with a refresh in its three steps."""
    config, small = recipe(name), tiny()
    own: dict[str, Any] = {}
    if isinstance(config.optimizer, SubspaceConfig):
        rank, gap = config.optimizer.rank, config.optimizer.update_proj_gap
        own = {"rank": min(rank, 16), "update_proj_gap": min(gap, 2)}
    if isinstance(config.optimizer, LoRAConfig):
        own = {"rank": 16}
    if isinstance(config.optimizer, ReLoRAConfig):
        own |= {"merge_every": 2, "restart_warmup_steps": 1}
    return replace(
        small,
        optimizer=replace(config.optimizer, **own),
        sampler=config.sampler,
        precision=config.precision,
        grad_clip=config.grad_clip,
    )


@pytest.mark.parametrize("name", EACH)
def test_a_shrunken_recipe_trains(name: str, data: Data) -> None:
    config = shrunken(name)
    validate(config)
    trained = Trainer(config, data)
    before = {key: p.detach().clone() for key, p in trained.model.named_parameters()}
    losses = [trained.train_step().loss for _ in range(config.steps)]
    assert losses[0] == pytest.approx(math.log(trained.vocab_size), rel=0.1)  # untrained: near uniform
    assert all(math.isfinite(loss) for loss in losses)
    after = dict(trained.model.named_parameters())
    assert all(p.dtype is torch.bfloat16 for p in after.values())
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    # the gains of the norms stand at 1, where bf16 has steps of 1/128: more than small rates
    still = set(trained.optimizer.parameter_groups.frozen if config.optimizer.name == "lora" else ())
    assert set(moved) >= {key for key, p in after.items() if p.ndim == 2} - still
    assert not still & set(moved)


QUICK_PLANS = ["galore_60m", "lora_60m", "rso_60m"]


def check_plan(name: str) -> None:
    config = replace(recipe(name), mode=Mode.plan)
    validate(config)
    plan = make_plan(config, gpus=False)
    weights, adapters = PARAMETERS[name.rsplit("_", 1)[1]], 0
    if isinstance(config.optimizer, LoRAConfig):
        model, rank = config.model, config.optimizer.rank
        sums = 4 * 2 * model.hidden_size + 3 * (model.hidden_size + model.intermediate_size)
        adapters = int(model.num_hidden_layers * rank * sums)
    assert plan.parameters.total == 2 * (weights + adapters)  # bf16, 32,000 pieces
    assert plan.optimizer_state == plan.formula_state
    width = {"float32": 4, "bfloat16": 2}[settings(config)["optimizer.state_dtype"]]
    if config.optimizer.name == "adam":
        assert plan.optimizer_state.total == 2 * width * weights
    elif name != "osd_60m":  # whose rank is all of hidden
        assert plan.optimizer_state.total < 2 * width * weights
    assert plan.peak > plan.parameters.total + plan.optimizer_state.total


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK_PLANS)
def test_a_recipe_plans(name: str) -> None:
    check_plan(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK_PLANS])
def test_every_recipe_plans(name: str) -> None:
    check_plan(name)
