"""The memory of a run before it starts, from the real step with fake tensors, and the GPUs that have it."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rsotrain.config.keys import plain
from rsotrain.config.schema import Config, Device
from rsotrain.errors import require
from rsotrain.instruments.memory import tensors_bytes
from rsotrain.instruments.phases import Phase
from rsotrain.instruments.work import Work, WorkCounter
from rsotrain.models.build import COMPUTE_DTYPE
from rsotrain.models.loss import chunk_tokens
from rsotrain.optim.formulas import state_bytes
from rsotrain.optim.with_bases import OptimizerWithBases
from rsotrain.planner.fake_run import FakeRun, with_micro_batches, world_size
from rsotrain.planner.floor import Floor, floor_of, gathered_block_bytes, holds_grams_at_once
from rsotrain.planner.gpus import Fit, fits
from rsotrain.planner.roofline import Speed, StepWork, speeds
from rsotrain.planner.tracker import Kind, MemoryTracker, Peak
from rsotrain.training.refreshes import groups_with_bases, update_gap

_MOST_TOKENS = 2**23  # of a pass; the loss is planned chunk by chunk, so that time grows with them


@dataclass(frozen=True)
class Share:
    """Bytes on one rank. ``blocks``: the share of the attention and MLP weights, and of their adapters."""

    total: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """Bytes on rank 0, the rank with the largest pieces.

    ``phases``: for each phase, the bytes by kind at its moment of most memory, and their sum ``peak``.
    ``formula_state``: the optimizer state in closed form; None where a method has none. ``traffic``: bytes
    that the rank sends in a step, by kind of collective: ``step`` without a refresh where there is such a
    step, ``refresh`` with one.
    ``speeds``: what a step should take on each GPU; empty in a plan for a CPU.
    """

    settings: dict[str, Any]
    parameters: Share
    gradients: Share
    optimizer_state: Share
    formula_state: Share | None
    saved_activations: int
    phases: dict[str, dict[str, int]]
    peak: int
    floor: Floor
    flops_per_token: int
    traffic: dict[str, dict[str, int]]
    gpus: list[Fit] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The content of a plan's file."""
        return asdict(self)


def device_kind_of(config: Config) -> str:
    """The kind of device that is planned for: a GPU, unless ``device=cpu``."""
    return "cpu" if config.device is Device.cpu else "cuda"


def make_plan(config: Config, *, gpus: bool = True) -> Plan:
    """Plan the run of ``config``. ``gpus``: also find each GPU's largest micro-batch and speed, which takes
    longer.

    Raises UserError where the settings do not fit together, and for a pass of very many tokens.
    """
    of_pass = with_micro_batches(config).micro_batch_size
    assert of_pass is not None
    require(
        of_pass * config.seq_len <= _MOST_TOKENS,
        f"one pass of {of_pass * config.seq_len:,} tokens ({of_pass:,} sequences of {config.seq_len}) is more"
        " than any GPU holds and would take long to plan; give a micro_batch_size, such as 8",
    )
    with FakeRun(config, device_kind_of(config)) as run:
        counters = {number: WorkCounter() if gpus else None for number in _steps(run)}
        trackers = {number: run.step(number, counter) for number, counter in counters.items()}
        of_steps = {number: tracker.peaks() for number, tracker in trackers.items()}
        peaks = _merged(of_steps)
        trainer, optimizer = run.trainer, run.trainer.optimizer
        formula = state_bytes(config, trainer.vocab_size)
        micro = trainer.config.micro_batch_size
        assert micro is not None
        parameters = Share(
            tensors_bytes(trainer.model.parameters()),
            sum(tensors_bytes(group.weights_held()) for group in optimizer.methods),
        )
        gradients = Share(run.gradients_bytes, run.block_gradients_bytes)
        state = Share(optimizer.state_bytes(), optimizer.block_state_bytes())
        phases = {
            phase.value: {kind.value: peaks[phase].by_kind.get(kind, 0) for kind in Kind}
            | {"peak": peaks[phase].total}
            for phase in Phase
            if phase in peaks
        }
        is_sharded = trainer.world.mesh is not None and trainer.world.mesh["shard"].size() > 1
        return Plan(
            settings=_settings(config, micro),
            parameters=parameters,
            gradients=gradients,
            optimizer_state=state,
            formula_state=None if formula is None else Share(formula.total, formula.blocks),
            saved_activations=run.saved_activations_bytes,
            phases=phases,
            floor=floor_of(
                parameters=parameters.total,
                gradients=gradients.total,
                optimizer_state=state.total,
                saved_activations=run.saved_activations_bytes,
                gathered_block=gathered_block_bytes(config, trainer.model) if is_sharded else 0,
                phases=phases,
                in_backward=optimizer.in_backward is not None,
                grams_at_once=holds_grams_at_once(config),
            ),
            peak=max(peak.total for peak in peaks.values()),
            flops_per_token=trainer.flops_per_token,
            traffic=_traffic(config, micro, trackers, of_steps),
            speeds=_speeds(config, run, counters, of_steps) if gpus and run.kind == "cuda" else [],
            gpus=_fits(run, of_steps, micro) if gpus else [],
        )


def _speeds(
    config: Config,
    run: FakeRun,
    counters: Mapping[int, WorkCounter | None],
    of_steps: Mapping[int, Mapping[Phase, Peak]],
) -> list[Speed]:
    trainer = run.trainer
    micro = trainer.config.micro_batch_size
    assert micro is not None
    number = config.batch_size // world_size(config) // micro

    def work_of(counter: WorkCounter | None) -> dict[str, Work]:
        assert counter is not None
        works = counter.of_step(number)
        works[Phase.optimizer_step].update(works.pop(None, Work()))  # reading the loss, and the like
        return {phase.value: work for phase, work in works.items() if phase is not None}

    refreshes = [step for step, peaks in of_steps.items() if Phase.refresh in peaks]
    quiet = [step for step in of_steps if step not in refreshes]
    without = work_of(counters[(quiet or refreshes)[-1]])
    refresh: dict[str, Work] = {}
    if any(group.bases.schedule.staggered for group in groups_with_bases(trainer)):
        whole = WorkCounter()  # a staggered refresh is of some bases, in each step perhaps; here it is of all
        run.refreshing_step(whole)
        refresh = work_of(whole)
        without.pop(Phase.refresh.value, None)
    elif quiet and refreshes:
        refresh = work_of(counters[refreshes[-1]])
    costly = [step for group in trainer.optimizer.groups if (step := group.costliest_step()) is not None]
    period = update_gap(trainer) or (costly[0] if costly else 1)
    return speeds(
        StepWork(without, refresh, min(period, config.steps)),
        tokens=config.batch_size * config.seq_len,
        flops_per_token=trainer.flops_per_token,
        world_size=world_size(config),
    )


def _fits(run: FakeRun, of_steps: dict[int, dict[Phase, Peak]], micro_batch: int) -> list[Fit]:
    chunk = chunk_tokens(run.trainer.vocab_size, COMPUTE_DTYPE[run.config.precision], run.kind)
    return fits(*_peak_of(run, of_steps, micro_batch), run.config.seq_len, micro_batch, chunk)


def _steps(run: FakeRun) -> list[int]:
    """Numbers (1-based) of the steps that differ in memory: one without a refresh and one with.

    Those of all optimizers of the run. The first step samples the first bases. It is planned if the run is
    too short for another refresh, if the sampler finds its first bases in another way, or if refreshes are
    staggered, as it samples all bases at once.
    """
    last, steps = run.config.steps, set[int]()
    for group in run.trainer.optimizer.groups:
        if isinstance(group, OptimizerWithBases):
            refresh = _refresh_step(group)
            if refresh > last:
                steps |= {1, min(2, last)}
                continue
            first = group.bases.sampler.by_products or group.bases.schedule.staggered
            steps |= {2, refresh} | ({1} if first else set())
        elif (costliest := group.costliest_step()) is not None:
            steps |= {1, min(2, last), min(costliest, last)}
    return sorted(steps or {1})


def _refresh_step(group: OptimizerWithBases) -> int:
    """The step with the most refreshing in the first round after the first bases. Unless refreshes are
    staggered, it is the first step of the round."""
    bases, schedule, ahead = group.bases, group.bases.schedule, group.samples_ahead

    def refreshed(step: int) -> int:
        due = (n for n, i in bases.positions.items() if schedule.refresh_index(i, step + ahead) is not None)
        return sum(bases.sizes[name][0] ** 2 for name in due)

    begin = schedule.gap + 1 - ahead
    return max(range(begin, begin + schedule.gap), key=refreshed) if schedule.staggered else begin


def _merged(of_steps: dict[int, dict[Phase, Peak]]) -> dict[Phase, Peak]:
    """The highest peak of each phase over all steps."""
    result: dict[Phase, Peak] = {}
    for peaks in of_steps.values():
        for phase, peak in peaks.items():
            if phase not in result or peak.total > result[phase].total:
                result[phase] = peak
    return result


_PASSES = (Phase.forward, Phase.backward)


def _peak_of(
    run: FakeRun, of_steps: dict[int, dict[Phase, Peak]], planned: int
) -> tuple[Callable[[int], int], int]:
    """(peak of forward and backward passes as a function of the micro-batch, peak of all other phases)."""

    in_backward = run.trainer.optimizer.in_backward is not None
    passes = tuple(Phase) if in_backward else _PASSES  # the update is a part of the backward pass

    def of_passes(peaks: dict[Phase, Peak]) -> int:
        return max(peaks[phase].total for phase in passes if phase in peaks)

    worst = max(of_steps, key=lambda number: of_passes(of_steps[number]))

    def peak_of(micro_batch: int) -> int:
        if micro_batch == planned:
            return of_passes(of_steps[worst])
        run.use_micro_batch(micro_batch)
        return of_passes(run.passes(worst).peaks())

    others = [p.total for peaks in of_steps.values() for phase, p in peaks.items() if phase not in passes]
    return peak_of, max(others, default=0)


def _traffic(
    config: Config, micro: int, trackers: dict[int, MemoryTracker], of_steps: dict[int, dict[Phase, Peak]]
) -> dict[str, dict[str, int]]:
    """Traffic of a step with all its micro-batches, of which the last differs from the others."""
    number = config.batch_size // world_size(config) // micro

    def of_step(step: int) -> dict[str, int]:
        first, last = trackers[step].traffic[0], trackers[step].traffic[-1]
        return {kind: last[kind] + (number - 1) * first[kind] for kind in sorted(first.keys() | last.keys())}

    refreshes = [step for step in of_steps if Phase.refresh in of_steps[step]]
    quiet = [step for step in of_steps if step not in refreshes]
    result = {"step": of_step((quiet or refreshes)[-1])}
    if quiet and refreshes:
        result["refresh"] = of_step(refreshes[-1])
    return result


def _settings(config: Config, micro: int) -> dict[str, Any]:
    """The settings by which plans may differ."""
    values = plain(config)
    return {
        "model": config.model.name,
        "hidden_size": config.model.hidden_size,
        "num_hidden_layers": config.model.num_hidden_layers,
        "optimizer": config.optimizer.name,
        "sampler": config.sampler.name,
        "rank": values["optimizer"].get("rank"),
        "update_proj_gap": values["optimizer"].get("update_proj_gap"),
        "staggered": values["optimizer"].get("staggered"),
        "state_dtype": values["optimizer"]["state_dtype"],
        "update_in_backward": values["optimizer"]["update_in_backward"],
        "rest": values["optimizer"]["rest"],
        "groups": values["optimizer"]["groups"],
        "precision": values["precision"],
        "activation_checkpointing": values["activation_checkpointing"],
        "parallelism": values["parallelism"]["strategy"],
        "world_size": world_size(config),
        "shard_size": config.parallelism.shard_size,
        "batch_size": config.batch_size,
        "micro_batch_size": micro,
        "seq_len": config.seq_len,
        "packing": values["data"]["packing"],
        "document_mask": config.data.document_mask,
        "device": device_kind_of(config),
    }
