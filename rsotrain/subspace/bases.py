"""The bases of a set of matrices, and their refreshes."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from rsotrain.instruments.devices import device_kind
from rsotrain.instruments.phases import Phase, phase
from rsotrain.subspace.gram import Gram
from rsotrain.subspace.numbered import cosine_columns, number_dtype, numbers_of
from rsotrain.subspace.orthonormal import orthonormalised
from rsotrain.subspace.refresh_record import RefreshRecord
from rsotrain.subspace.samplers import Sampler, SampleRequest
from rsotrain.subspace.schedule import RefreshSchedule
from rsotrain.subspace.seeding import seed_of
from rsotrain.subspace.sources import Source, spread

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Elements of gathered matrices that one rank holds while it samples the bases of a round: 128 MiB in float32.
_ROUND_ELEMENTS = 1 << 25
SAMPLED, NOT_FINITE, ZERO, FAILED = range(1, 5)  # outcomes; a plan reads 1 from every tensor
REASONS = {NOT_FINITE: "is not finite", FAILED: "could not be decomposed"}


@dataclass(frozen=True)
class BasisChange:
    """A refresh of one basis from ``old``, P_old = Q_old·S (k×r), to ``new``, P_new, of scaled columns.

    ``scale``: the norm of all columns, or of each of those of ``old`` where they differ.
    """

    old: Tensor
    new: Tensor
    scale: float | Tensor = 1.0

    @cached_property
    def transition(self) -> Tensor:
        """C = P_newᵀ P_old S⁻², r×r, which is Q_newᵀQ_old where all columns have one norm.

        It takes A P_old to A Q_old Q_oldᵀ P_new: A P_old Cᵀ.
        """
        wide = torch.promote_types(self.old.dtype, torch.float32)
        return (self.new.to(wide).T @ self.old.to(wide)) / self.scale**2

    def overlap(self, orthonormal: bool) -> Tensor:
        """‖Q_newᵀ Q_old‖_F² / r for orthonormal bases of both subspaces, which is 1 if these are the same."""
        transition = self.transition
        if isinstance(self.scale, Tensor):
            old, new = (
                torch.nn.functional.normalize(q.to(transition.dtype), dim=0) for q in (self.old, self.new)
            )
            transition = new.T @ old
        elif not orthonormal:
            old, new = (orthonormalised(q.to(transition.dtype)) for q in (self.old, self.new))
            transition = new.T @ old
        return transition.square().sum() / self.old.shape[1]


class Bases:
    """One basis for each name. It is refreshed when due, and ``record`` keeps the metrics of refreshes.

    ``sizes``: (k, r) of each basis. ``state[name]`` holds the sampler's own tensors and ``basis`` (k×r). This
    is zero until the first refresh, so that nothing is projected before there is a subspace. Random numbers
    are a function of (seed, name, refresh index) alone. A basis that depends on no data therefore need not be
    ``stored``: each use samples it again, bitwise the same, and the state holds ``basis_seed`` instead,
    which lets a run that resumes with other settings, or on another kind of device, keep the basis that its
    moments refer to. ``numbered``: the state holds ``columns`` (r) instead, the numbers of the basis' columns
    in the cosine transform, −1 before the first refresh, and each use makes the basis of them. ``scaled``:
    sampled bases are multiplied by √(k/r), which gives E[QQᵀ] = I for uniformly random orthonormal ones, or
    by the sampler's ``column_scales``. ``mesh``: the ranks that have the same bases; they call ``refreshed``
    together.
    """

    def __init__(
        self,
        sizes: dict[str, tuple[int, int]],
        sampler: Sampler,
        *,
        gap: int,
        staggered: bool,
        seed: int,
        total_steps: int,
        dtype: torch.dtype,
        devices: dict[str, torch.device],
        scaled: bool = False,
        stored: bool = True,
        numbered: bool = False,
        mesh: "DeviceMesh | None" = None,
    ) -> None:
        assert stored or not sampler.informed, "a data-dependent basis cannot be sampled again"
        assert not numbered or (stored and not scaled), "columns of the transform have norm 1"
        self.sizes = sizes
        self.sampler = sampler
        self.switch_step: int | None = None
        if sampler.switch is not None:  # the tolerance keeps rounding errors (of 1 − 0.7) from adding a step
            self.switch_step = 1 + math.ceil(sampler.switch * total_steps - 1e-6)
        restart = self.switch_step if self.switch_step != 1 else None
        self.schedule = RefreshSchedule(gap, len(sizes), staggered, restart)
        self.seed = seed
        self.dtype = dtype
        self.devices = devices
        self.scaled = scaled
        self.stored = stored
        self.numbered = numbered
        self.mesh = mesh
        self.positions = {name: i for i, name in enumerate(sizes)}
        self.seeds = {name: self._seed_of(name, 0) for name in sizes}  # of the bases in use
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, (size, rank) in sizes.items():
            if numbered:
                none = torch.full((rank,), -1, dtype=number_dtype(size), device=devices[name])
                self.state[name] = {"columns": none}
            elif stored:
                self.state[name] = {"basis": torch.zeros(size, rank, dtype=dtype, device=devices[name])}
            else:
                self.state[name] = {"basis_seed": torch.tensor(self.seeds[name], device=devices[name])}
            for key, shape in sampler.state_shapes(size, rank).items():
                self.state[name][key] = torch.zeros(shape, device=devices[name])
        self.waiting = set(sizes) if stored else set()  # names whose first refresh has not succeeded yet
        self._first_refreshes = dict.fromkeys(sizes, 0)  # step of each first refresh in this process; 0: none
        self.record = RefreshRecord(gap, mesh)
        self.lr_share = 1.0  # a second ``lr_factor``, for those who set the learning rate itself

    def __getitem__(self, name: str) -> Tensor:
        if self.numbered:
            return self.together([name])[0]
        if self.stored:
            return self.state[name]["basis"]
        return self._sampled(self._request(name, self.seeds[name]))

    def together(self, names: Sequence[str]) -> Tensor:
        """The bases in use of several matrices of one size, n×k×r."""
        if not self.numbered:
            return torch.stack([self[name] for name in names])
        numbers = torch.stack([self.state[name]["columns"] for name in names])
        return cosine_columns(numbers, self.sizes[names[0]][0]).to(self.dtype)

    def _keep(self, names: Sequence[str], bases: Sequence[Tensor]) -> None:
        """Replace the bases in use, which are stored or numbered; k×r each."""
        if not self.numbered:
            torch._foreach_copy_([self.state[name]["basis"] for name in names], list(bases))
            return
        numbers = numbers_of(torch.stack(list(bases)))  # one transform for all
        torch._foreach_copy_([self.state[name]["columns"] for name in names], list(numbers.unbind()))

    def resume(self) -> None:
        """Called after the optimizer state has been loaded."""
        if self.stored:
            key, none = ("columns", -1) if self.numbered else ("basis", 0)
            found = torch.stack([(self.state[name][key] != none).any() for name in self.sizes]).tolist()
            self.waiting = {name for name, any_ in zip(self.sizes, found, strict=True) if not any_}
        else:
            seeds = torch.stack([self.state[name]["basis_seed"] for name in self.sizes]).tolist()
            self.seeds = dict(zip(self.sizes, seeds, strict=True))

    def hear(self, before: int | None = None) -> None:
        """Take note of how the refreshes of steps ``before`` this one ended, or all; here that is known."""

    def _seed_of(self, name: str, index: int | str) -> int:
        """The seed of a refresh; its complement, which is negative, where normal numbers are counted.

        So a basis that was drawn on one kind of device is drawn again the same on the other.
        """
        seed = seed_of(self.seed, "basis", name, index)
        return seed if device_kind(self.devices[name]) == "cpu" else ~seed

    def request(self, name: str, index: int | str) -> SampleRequest:
        """The request for the refresh ``index``, without data."""
        return self._request(name, self._seed_of(name, index))

    def _request(self, name: str, seed: int) -> SampleRequest:
        size, rank = self.sizes[name]
        counted = (~seed,) if seed < 0 else None
        random = torch.Generator().manual_seed(max(seed, ~seed))
        return SampleRequest(size, rank, None, random, self.devices[name], counted=counted)

    def place(self, name: str, basis: Tensor) -> None:
        """Replace the basis in use by an orthonormal ``basis``, which is scaled if ``scaled``."""
        size, rank = self.sizes[name]
        kept = self.state[name]["basis"]
        wide = torch.promote_types(self.dtype, basis.dtype)
        kept.copy_(basis.to(wide) * self._scale(size, rank))
        self.waiting.discard(name)

    def _sampled(self, request: SampleRequest) -> Tensor:
        basis = self.sampler.sample(request)
        if self.scaled:
            wide = torch.promote_types(self.dtype, basis.dtype)
            scales = self.sampler.column_scales
            factors = None if scales is None else scales(request.size, request.rank).to(basis.device, wide)
            basis = basis.to(wide) * (self._scale(request.size, request.rank) if factors is None else factors)
        # one memory layout for all: products with a stored and a regenerated basis are then bitwise equal
        return basis.to(self.dtype).contiguous()

    def _scale(self, size: int, rank: int) -> float:
        return (size / rank) ** 0.5 if self.scaled else 1.0

    def _scale_in_use(self, name: str, basis: Tensor) -> float | Tensor:
        """Norms of the columns of the basis in use, which a method may have placed with one scale for all."""
        if not self.scaled or self.sampler.column_scales is None:
            return self._scale(*self.sizes[name])
        norms = torch.linalg.vector_norm(basis.to(torch.promote_types(basis.dtype, torch.float32)), dim=-2)
        return torch.where(norms > 0, norms, 1.0)

    def informed(self, step: int) -> bool:
        """Does a refresh for ``step`` need data?"""
        return self.sampler.informed and not self._switched(step)

    def _switched(self, step: int) -> bool:
        return self.switch_step is not None and step >= self.switch_step

    def due(self, name: str, step: int, *, after_update: bool) -> bool:
        """Is a refresh due at ``step`` before (or after) the weights are updated?

        The first refresh stays due until it succeeds; no other refresh follows in the same step.
        """
        if name in self.waiting:
            return not after_update
        if after_update and self._first_refreshes[name] == step:
            return False
        index = self.schedule.refresh_index(self.positions[name], step)
        return index is not None and after_update == (self.sampler.post_update and index > 0)

    @torch.no_grad()
    def refreshed(
        self,
        sources: Mapping[str, Source],
        step: int,
        lr_factor: float,
        index: Callable[[str], int] | None = None,
    ) -> Iterator[tuple[str, BasisChange]]:
        """Refresh the bases of ``sources``; yield the name and the change of each that has changed.

        Only one old basis at a time is in memory, or those of one round where the ranks of a mesh divide the
        work, if the caller keeps none. ``index``: the refresh index of each basis; None: the index of the
        refresh that is due at ``step``.
        """
        number = index or (lambda name: self.schedule.latest(self.positions[name], step)[0])
        divided = self.mesh is not None and self.informed(step)
        alone = [n for n in sources if divided and (self._first(n, number) or not self.sampler.by_products)]
        everywhere = {name: source for name, source in sources.items() if name not in alone}
        yield from self._refresh_everywhere(everywhere, step, lr_factor, number)
        for names in self._rounds(alone, sources):
            with phase(Phase.refresh):
                changes = self._share({name: sources[name] for name in names}, step, lr_factor, number)
            yield from changes.items()

    def _first(self, name: str, number: Callable[[str], int]) -> bool:
        return number(name) == 0 or name in self.waiting

    def _refresh_everywhere(
        self, sources: Mapping[str, Source], step: int, lr_factor: float, number: Callable[[str], int]
    ) -> Iterator[tuple[str, BasisChange]]:
        """Refresh bases that each rank samples itself."""
        for name, source in sources.items():
            with phase(Phase.refresh):
                change = self.refresh(name, source.everywhere, step, lr_factor, number(name))
            if change is not None:
                yield name, change

    def _rounds(self, names: list[str], sources: Mapping[str, Source]) -> Iterator[list[str]]:
        """Divide ``names``, in order, into rounds whose gathered matrices the ranks can hold together."""
        if not names:
            return
        assert self.mesh is not None
        largest = max(sources[name].elements for name in names)
        limit = self.mesh.size() * max(_ROUND_ELEMENTS, largest)
        round_: list[str] = []
        held = 0
        for name in names:
            if held + sources[name].elements > limit:
                yield round_
                round_, held = [], 0
            round_.append(name)
            held += sources[name].elements
        yield round_

    def _share(
        self, sources: Mapping[str, Source], step: int, lr_factor: float, number: Callable[[str], int]
    ) -> dict[str, BasisChange]:
        """Refresh bases: one rank gathers each matrix, samples its basis and broadcasts it."""
        assert self.mesh is not None
        names = list(sources)
        rank, size, owners = dist.get_rank(), dist.get_world_size(), self._owners(sources)
        device = self.devices[names[0]]
        with self.record.timing(step, device):
            arriving = {name: sources[name].at(owners[name]) for name in names}
            sampled: dict[str, Tensor] = {}
            outcomes = torch.zeros(len(names), dtype=torch.int64, device=device)
            for i, name in enumerate(names):
                if owners[name] == rank:
                    outcome, new = self._try_sample(
                        name, self[name], arriving.pop(name)(), step, lr_factor, number(name)
                    )
                    outcomes[i] = outcome
                    if new is not None:
                        sampled[name] = new
            for leaving in arriving.values():
                leaving()
            dist.all_reduce(outcomes)
            found = dict(zip(names, outcomes.tolist(), strict=True))
            for owner in range(size):
                sent = [name for name in names if owners[name] == owner and found[name] == SAMPLED]
                if sent:
                    sampled |= self._broadcast(sent, owner, sampled)
        changes = {}
        for name in names:
            if reason := REASONS.get(found[name]):
                self.record.skip(name, step, reason, name in self.waiting)
            change = self._settle(name, self[name], sampled.get(name), step, number(name))
            if change is not None:
                changes[name] = change
        return changes

    @staticmethod
    def _owners(sources: Mapping[str, Source]) -> dict[str, int]:
        costs = [source.cost for source in sources.values()]
        return dict(zip(sources, spread(costs, dist.get_world_size()), strict=True))

    def _broadcast(self, names: list[str], owner: int, sampled: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = [self.sizes[name] for name in names]
        lengths = [size * rank for size, rank in shapes]
        if dist.get_rank() == owner:
            flat = torch.cat([sampled[name].flatten() for name in names])
        else:
            flat = torch.empty(sum(lengths), dtype=self.dtype, device=self.devices[names[0]])
        dist.broadcast(flat, src=owner)
        return {n: t.view(shape) for n, t, shape in zip(names, flat.split(lengths), shapes, strict=True)}

    @torch.no_grad()
    def refresh(
        self,
        name: str,
        gram: Callable[[], Gram | None],
        step: int,
        lr_factor: float,
        index: int | None = None,
    ) -> BasisChange | None:
        """Refresh one basis. ``index``: its refresh index; None: that of the refresh due at ``step``.

        ``gram`` is called only if the sampler needs data. The old basis stays if ``gram`` returns None
        because the gradient is not finite, if the decomposition fails, or if the gradient is zero. The first
        two are counted, and the first failure is warned of. Returns None at the first refresh and where the
        basis stays.
        """
        if index is None:
            index = self.schedule.latest(self.positions[name], step)[0]
        old = self[name]
        with self.record.timing(step, old.device):
            seen = gram() if self.informed(step) else None
            outcome, new = self._try_sample(name, old, seen, step, lr_factor, index)
        if reason := REASONS.get(outcome):
            self.record.skip(name, step, reason, name in self.waiting)
        return self._settle(name, old, new, step, index)

    def _settle(
        self, name: str, old: Tensor, new: Tensor | None, step: int, index: int
    ) -> BasisChange | None:
        """Replace ``old``, the basis in use, by ``new`` if there is one."""
        if new is None:
            return None
        first = name in self.waiting or step == 1
        change = None if first else BasisChange(old.clone(), new, self._scale_in_use(name, old))
        self._note(name, change, step, index)
        if self.stored:
            self._keep([name], [new])
        return change

    def _note(self, name: str, change: BasisChange | None, step: int, index: int) -> None:
        """Keep the books of a basis that is new in ``step``."""
        if self.record.measures(index):
            self.record.sampled(name, None if change is None else change.overlap(self.sampler.orthonormal))
        if name in self.waiting:
            self.waiting.remove(name)
            self._first_refreshes[name] = step
        if not self.stored:
            self.seeds[name] = self._seed_of(name, index)
            self.state[name]["basis_seed"].fill_(self.seeds[name])

    def _try_sample(
        self, name: str, old: Tensor, seen: Gram | None, step: int, lr_factor: float, index: int
    ) -> tuple[int, Tensor | None]:
        """(outcome, new basis or None). ``seen``: None if no data are needed or if they are not finite."""
        request = self.request(name, index)
        if self.informed(step):
            if seen is None:
                return NOT_FINITE, None
            if seen.is_zero:
                return ZERO, None
        request.gram = seen
        request.switched = self._switched(step)
        request.lr_factor = lr_factor * self.lr_share
        request.states = [self.state[name]]
        if index > 0 and name not in self.waiting:
            request.previous = old / self._scale_in_use(name, old) if self.scaled else old
        try:
            return SAMPLED, self._sampled(request)
        except torch.linalg.LinAlgError:
            return FAILED, None
