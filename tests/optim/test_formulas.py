"""Closed formulas of the optimizer state: against the optimizers, and against the papers' tables."""

import pytest
import torch
from helpers.runs import EACH_OPTIMIZER, compose

from rsotrain.config.choices import RestRule
from rsotrain.config.schema import Config
from rsotrain.models.build import build_model, count_parameters
from rsotrain.optim.build import build_optimizer
from rsotrain.optim.formulas import StateBytes, state_bytes, weights_of

VOCAB_SIZE = 32000


def built_state_bytes(config: Config) -> int:
    """Of the optimizer itself, built without memory."""
    meta = torch.device("meta")
    model = build_model(config.model, vocab_size=VOCAB_SIZE, precision=config.precision, device=meta, seed=0)
    return build_optimizer(
        model, config.optimizer, config.sampler, precision=config.precision, seed=0, total_steps=10
    ).state_bytes()


@pytest.mark.parametrize("optimizer", EACH_OPTIMIZER)
@pytest.mark.parametrize(
    "more",
    [
        [],
        ["precision=fp32", "optimizer.state_dtype=bfloat16"],
        ["model.tie_word_embeddings=true"],
        ["precision=bf16", "optimizer.state_dtype=int8"],
        ["optimizer.state_dtype=int8", "model.intermediate_size=61"],
    ],
)
def test_the_formula_is_the_optimizer(optimizer: str, more: list[str]) -> None:
    config = compose(["model=llama_tiny", "model.num_key_value_heads=2", f"optimizer={optimizer}", *more])
    assert state_bytes(config, VOCAB_SIZE).total == built_state_bytes(config)


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("rso", ["optimizer.projection=regenerated"]),
        ("rso", ["optimizer.proximal_eta=1.0"]),
        ("rso", ["optimizer.solver=momentum", "optimizer.rank=7"]),
        ("rso", [r"optimizer.block_parameters=['q_proj', 'up_proj']"]),
        ("galore", ["sampler=online_pca", "sampler.solver=sgd"]),
        ("galore", ["optimizer.rank=5"]),
        *((method, ["sampler=dct"]) for method in ("galore", "ldadam", "alice", "rso")),
        ("galore", ["sampler=dct", "sampler.storage=stored"]),
        ("sn", ["optimizer.subset_size=4"]),
        ("sn_sm", ["optimizer.subset_size=4"]),
        *(("galore", [f"optimizer.rest={rule.name}", "optimizer.state_dtype=bfloat16"]) for rule in RestRule),
        ("rso", ["optimizer.rest=foam", "optimizer.state_dtype=int8"]),
    ],
)
def test_the_formula_knows_the_options(optimizer: str, more: list[str]) -> None:
    config = compose(["model=llama_tiny", f"optimizer={optimizer}", *more])
    assert state_bytes(config, VOCAB_SIZE).total == built_state_bytes(config)


# GaLore's table 2, recomputed from the shapes: bf16 everywhere, decimal GB. Size: (rank, weights, Adam's
# states, their sum, GaLore's low-rank states, states of the rest, GaLore's sum), as they are printed.
TABLE = {
    "llama_60m": (128, ".116", ".232", ".348", ".0326", ".1311", ".280"),
    "llama_130m": (256, ".268", ".536", ".805", ".1463", ".1967", ".611"),
    "llama_350m": (256, ".736", "1.472", "2.208", ".3905", ".2623", "1.389"),
    "llama_1b": (512, "2.678", "5.356", "8.034", "1.5602", ".5247", "4.763"),
    "llama_7b": (1024, "13.477", "26.954", "40.430", "8.3551", "1.0496", "22.882"),
}


def papers(model: str, optimizer: str, rank: int | None = None) -> tuple[int, StateBytes]:
    """Bytes of the weights and of the state where both are bf16, without the 4 bytes a matrix of counts."""
    ranks = [] if rank is None else [f"optimizer.rank={rank}"]
    config = compose(
        [
            f"model={model}",
            f"optimizer={optimizer}",
            "precision=bf16",
            "optimizer.state_dtype=bfloat16",
            *ranks,
        ]
    )
    return 2 * count_parameters(config.model, VOCAB_SIZE), state_bytes(config, VOCAB_SIZE)


def assert_printed(nbytes: int, printed: str) -> None:
    digits = len(printed.split(".")[1])
    assert f"{nbytes / 1e9:.{digits}f}".lstrip("0") == printed.lstrip("0")


@pytest.mark.parametrize("model", TABLE)
def test_weights_and_states_are_the_papers(model: str) -> None:
    rank, weights, adam, adam_sum, low_rank, rest, galore_sum = TABLE[model]
    parameters, state = papers(model, "adam")
    assert_printed(parameters, weights)
    assert_printed(state.total, adam)
    assert_printed(parameters + state.total, adam_sum)
    _, state = papers(model, "galore", rank)
    assert_printed(state.blocks, low_rank)
    assert_printed(state.rest, rest)
    assert_printed(parameters + state.total, galore_sum)


def block_shapes(model: str) -> list[tuple[int, ...]]:
    config = compose([f"model={model}"])
    return [w.shape for w in weights_of(config.model, VOCAB_SIZE) if w.input_group]


@pytest.mark.parametrize("model", TABLE)
def test_states_of_sn_sm_and_rso_are_those_of_their_papers(model: str) -> None:
    """SN-SM: r·max + r·min + max a linear. RSO: 2·r·out + r·in, but one P for all linears of one input."""
    rank = TABLE[model][0]
    shapes = block_shapes(model)
    _, state = papers(model, "sn_sm", rank)
    assert state.blocks == 2 * sum(rank * max(s) + rank * min(s) + max(s) for s in shapes)
    counts = 4 * len(shapes)
    _, state = papers(model, "rso", rank)
    q, _, _, o, gate, _, down = shapes[:7]
    num_blocks = len(shapes) // 7
    bases = rank * num_blocks * sum(shape[1] for shape in (q, o, gate, down))
    counts = 4 * len(shapes)
    assert state.blocks - counts == 2 * (sum(2 * rank * s[0] for s in shapes) + bases)
