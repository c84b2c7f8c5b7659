"""What travels between ranks in a step: collectives and bytes, counted on two ranks."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.runs import OPTIMIZERS, compose, load_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rsotrain.config.methods import SubspaceConfig
from rsotrain.config.schema import Config, Strategy
from rsotrain.data.build import Data
from rsotrain.parallel import exchange
from rsotrain.parallel.ranks import World
from rsotrain.training.trainer import Trainer

pytestmark = pytest.mark.slow  # ranks that train for all of them

GAP = 5  # refreshes at steps 1, 6, …; the quiet step that is counted is the third
METHODS = tuple(OPTIMIZERS)
MICRO = {f"{name}, two micro-batches": name for name in ("adam", "galore", "rso")}


class Traffic(TorchDispatchMode):
    """Collectives by kind, and the bytes that a rank puts into them.

    Those of ``exchange`` count as the collectives that they are, not as what they send.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Traffic":
        for kind in ("all_gather", "reduce_scatter"):
            self.patch.setattr(exchange, kind, partial(self._count, kind, getattr(exchange, kind)))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.patch.undo()

    def _count(self, kind: str, call: Any, out: torch.Tensor, given: torch.Tensor, group: Any) -> Any:
        kind = kind.replace("all_gather", "allgather")
        self.counts[kind] += 1
        self.bytes[kind] += given.numel() * given.element_size()
        return call(out, given, group)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = func._schema.name.removeprefix("c10d::").strip("_").replace("_base", "")
            # inputs come second where there are outputs of their own
            given = args[1] if kind in ("allgather", "reduce_scatter", "gather", "scatter") else args[0]
            if kind not in ("send", "recv"):
                self.counts[kind] += 1
                self.bytes[kind] += sum(
                    t.numel() * t.element_size() for t in tree_leaves(given) if isinstance(t, torch.Tensor)
                )
        return func(*args, **(kwargs or {}))


def count(config: Config, data: Data, world: World) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    trainer = Trainer(config, data, world)
    result = {}
    for step in range(1, GAP + 2):
        with Traffic() as traffic:
            trainer.train_step()
        if step in (3, GAP + 1):
            result["quiet" if step == 3 else "refresh"] = (dict(traffic.counts), dict(traffic.bytes))
    shapes = [tuple(p.shape) for n, p in trainer.model.named_parameters() if "_proj" in n]
    return result | {"shapes": shapes}


@pytest.fixture(scope="module", params=[Strategy.fsdp, Strategy.ddp], ids=["fsdp", "ddp"])
def traffic(
    request: pytest.FixtureRequest, tiny: list[str], cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Strategy, dict[str, Any]]:
    shared = [*tiny, "steps=20"]
    configs = {}
    for name in METHODS:
        own = []
        if isinstance(compose([f"optimizer={name}"]).optimizer, SubspaceConfig):
            own += ["optimizer.rank=16"] if name != "apollo_mini" else []
            own += [f"optimizer.update_proj_gap={GAP}"] if name not in ("osd", "ldadam") else []
        if name == "orbit":
            own += ["optimizer.group=8"]  # divides the rows of each rank
        configs[name] = compose([*shared, f"optimizer={name}", *own])
    for label, name in MICRO.items():
        configs[label] = replace(configs[name], micro_batch_size=1)
    data = load_data(configs["adam"], cache_dir)
    checks = {name: partial(count, config, data) for name, config in configs.items()}
    found = ranks.run(2, checks, tmp_path_factory.mktemp("traffic"), request.param)
    return request.param, {name: ranks.succeeded(outcomes)[0] for name, outcomes in found.items()}


def test_methods_with_a_fixed_basis_add_nothing_to_adam(traffic: tuple[Strategy, dict[str, Any]]) -> None:
    _, found = traffic
    for name in ("galore", "i3s", "sn", "sm", "sn_sm", "frugal", "carry", "orbit", "foam", "lion"):
        assert found[name]["quiet"] == found["adam"]["quiet"], name


def test_rso_sends_no_gradient_of_a_weight(traffic: tuple[Strategy, dict[str, Any]]) -> None:
    strategy, found = traffic
    kind = "reduce_scatter" if strategy is Strategy.fsdp else "allreduce"
    adam, rso = found["adam"], found["rso"]
    blocks = sum(4 * rows * columns for rows, columns in adam["shapes"])
    low_rank = sum(4 * rows * 16 for rows, _ in adam["shapes"])
    assert adam["quiet"][1][kind] - rso["quiet"][1][kind] == blocks - low_rank
    # nothing is gathered beyond the weights themselves: B is not, P comes from its seed
    assert rso["quiet"][1].get("allgather") == adam["quiet"][1].get("allgather")
    assert rso["refresh"] == rso["quiet"]


def test_micro_batches_send_gradients_each_and_replicas_once(
    traffic: tuple[Strategy, dict[str, Any]],
) -> None:
    strategy, found = traffic
    kind = "reduce_scatter" if strategy is Strategy.fsdp else "allreduce"
    times = 2 if strategy is Strategy.fsdp else 1
    scalars = (
        found["adam"]["quiet"][1]["allreduce"] if strategy is Strategy.fsdp else 0
    )  # loss, norm, signals
    for label, name in MICRO.items():
        one, two = found[name]["quiet"][1], found[label]["quiet"][1]
        if strategy is Strategy.fsdp:
            assert two[kind] == times * one[kind], name
            assert two["allreduce"] == one["allreduce"] == scalars, name
        else:
            assert two == one, name
    adam, rso = (found[label]["quiet"][1] for label in ("adam, two micro-batches", "rso, two micro-batches"))
    blocks = sum(4 * rows * columns for rows, columns in found["adam"]["shapes"])
    low_rank = sum(4 * rows * 16 for rows, _ in found["adam"]["shapes"])
    assert adam[kind] - rso[kind] == times * (blocks - low_rank)


def test_norms_of_whole_matrices_cost_scalars(traffic: tuple[Strategy, dict[str, Any]]) -> None:
    strategy, found = traffic
    matrices = len(found["adam"]["shapes"])
    adam = found["adam"]["quiet"]
    for name, scalars, reductions in (("fira", 2, 1), ("apollo", 1, 1), ("apollo_mini", 3, 2)):
        counts, sizes = found[name]["quiet"]
        if strategy is Strategy.ddp:  # each rank has the whole matrices
            assert (counts, sizes) == adam
            continue
        assert counts["allreduce"] - adam[0]["allreduce"] == reductions * matrices, name
        assert sizes["allreduce"] - adam[1]["allreduce"] == 4 * scalars * matrices, name


def test_racs_sums_its_column_scales_by_few_reductions(traffic: tuple[Strategy, dict[str, Any]]) -> None:
    strategy, found = traffic
    adam, racs = found["adam"]["quiet"], found["racs"]["quiet"]
    if strategy is Strategy.ddp:
        assert racs == adam
        return
    # for all matrices together: the sum of the squares, five iterations, inner products of the six vectors of
    # rows, the norm of the update
    assert racs[0]["allreduce"] - adam[0]["allreduce"] == 8
    numbers = sum(1 + 5 * columns + 6 * 6 + 1 for _, columns in found["adam"]["shapes"])
    assert racs[1]["allreduce"] - adam[1]["allreduce"] == 4 * numbers


def test_moments_in_the_subspace_are_orthogonalised_and_tracked_by_sums_of_their_rank(
    traffic: tuple[Strategy, dict[str, Any]],
) -> None:
    strategy, found = traffic
    adam, matrices = found["adam"]["quiet"], len(found["adam"]["shapes"])
    # RᵀR in float32, and the norm of the residual; MᵀM in float64; without tracking the norm alone
    for name, each in (("alice", 4 * 16**2 + 4), ("sumo", 8 * 16**2), ("alice_0", 4)):
        extra = found[name]["quiet"][1].get("allreduce", 0) - adam[1].get("allreduce", 0)
        assert extra == (each * matrices if strategy is Strategy.fsdp else 0), name


def test_scale_sums_the_columns_of_the_embedding_alone(traffic: tuple[Strategy, dict[str, Any]]) -> None:
    strategy, found = traffic
    adam, scale = found["adam"]["quiet"], found["scale"]["quiet"]
    assert scale[0]["allreduce"] - adam[0]["allreduce"] == (strategy is Strategy.fsdp)


def test_a_refresh_gathers_each_gradient_once_and_sends_each_basis_once(
    traffic: tuple[Strategy, dict[str, Any]],
) -> None:
    strategy, found = traffic
    shapes = found["adam"]["shapes"]
    for name in ("galore", "i3s", "sn_sm", "fira"):
        (quiet, quiet_bytes), (counts, sizes) = found[name]["quiet"], found[name]["refresh"]
        gathered = len(shapes) if strategy is Strategy.fsdp else 0
        assert counts.get("gather", 0) == gathered, name
        assert sizes.get("gather", 0) == (sum(4 * m * n for m, n in shapes) // 2 if gathered else 0)
        assert counts["broadcast"] == 2  # one from each rank, of all that it has sampled
        assert sizes["broadcast"] == sum(4 * 16 * min(shape) for shape in shapes)
        assert counts["allreduce"] == quiet["allreduce"] + 1  # how each refresh went
        assert counts.get("reduce_scatter") == quiet.get("reduce_scatter")
        assert sizes.get("allgather") == quiet_bytes.get("allgather")


def test_bases_that_change_each_step_cost_products_of_their_size(
    traffic: tuple[Strategy, dict[str, Any]],
) -> None:
    strategy, found = traffic
    shapes = found["adam"]["shapes"]
    basis_bytes = sum(4 * 16 * min(shape) for shape in shapes)
    for name in ("osd", "ldadam"):
        extra = found[name]["quiet"][1]["allreduce"] - found["adam"]["quiet"][1]["allreduce"]
        if strategy is Strategy.ddp:
            assert extra == 0
        else:  # one product with the Gram matrix; its largest entry and its energy are 12 bytes
            assert basis_bytes < extra <= basis_bytes + 12 * len(shapes), name
        assert "gather" not in found[name]["quiet"][0]


def test_power_iterations_of_a_high_rank_reduce_each_gram_matrix_once(
    traffic: tuple[Strategy, dict[str, Any]],
) -> None:
    strategy, found = traffic
    carry = found["carry"]
    grams = sum(4 * min(shape) ** 2 for shape in carry["shapes"]) if strategy is Strategy.fsdp else 0
    scalars = carry["refresh"][1]["allreduce"] - carry["quiet"][1]["allreduce"] - grams
    assert 0 <= scalars <= 64 * len(carry["shapes"])
    assert carry["refresh"][1].get("allgather") == carry["quiet"][1].get("allgather")
