"""Bases on a GPU: refreshed in batches of matrices of one size, without the host waiting for the device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsotrain.instruments.phases import Phase, phase
from rsotrain.subspace.bases import FAILED, NOT_FINITE, REASONS, SAMPLED, ZERO, Bases, BasisChange
from rsotrain.subspace.gram import Gram, JoinedGram
from rsotrain.subspace.samplers import Sampler, SampleRequest
from rsotrain.subspace.seeding import seed_of
from rsotrain.subspace.sources import Source

# Elements of the matrices of a batch, unless one alone has more: 16 MiB in float32. Small matrices, whose
# kernels do not fill a GPU, come together by dozens; large ones one by one, with no more memory than that.
BATCH_ELEMENTS = 1 << 22

Number = Callable[[str], int]


def bases_on(kind: str, sizes: dict[str, tuple[int, int]], sampler: Sampler, **keywords: Any) -> Bases:
    """Bases for a kind of device."""
    if kind != "cuda":
        return Bases(sizes, sampler, **keywords)
    return BatchedBases(sizes, sampler.on_gpu or sampler, **keywords)


@dataclass(frozen=True)
class _Sent:
    """Outcomes of a step's refreshes on their way to the host. ``first``: names that had no basis before."""

    names: Sequence[str]
    first: frozenset[str]
    step: int
    outcomes: Tensor
    arrived: "torch.cuda.Event | None"


class BatchedBases(Bases):
    """``Bases`` whose refreshes are kernels for whole batches, and whose outcomes the host hears of later.

    Whether a gradient is finite and not zero is decided on the device, which keeps the old basis where it is
    not. Such a refresh is, for the method, one to the same basis: moments are zeroed or transported by QᵀQ.
    The host hears of it when it has waited for the device anyway, in the next step or for metrics: a failure
    is counted and warned of then, and a first refresh that failed is due again. Random numbers are functions
    of the seed and their place. Bases that are not stored are sampled one by one, since products in batches
    of other sizes may round differently.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._sent: list[_Sent] = []

    def __getitem__(self, name: str) -> Tensor:
        if self.stored or self.seeds[name] >= 0:
            return super().__getitem__(name)
        return self._sampled(self._requests([name], [self.seeds[name]]))[0]

    def _seed_of(self, name: str, index: int | str) -> int:
        return ~seed_of(self.seed, "basis", name, index)

    def _requests(self, names: Sequence[str], seeds: Sequence[int]) -> SampleRequest:
        """One request for matrices of one size."""
        request = self._request(names[0], seeds[0])
        request.counted, request.batched = tuple(~seed for seed in seeds), True
        request.states = [self.state[name] for name in names]
        return request

    # --- what the host hears -------------------------------------------------------------------

    def resume(self) -> None:
        self._sent.clear()
        super().resume()

    def due(self, name: str, step: int, *, after_update: bool) -> bool:
        self.hear(before=step)
        return super().due(name, step, after_update=after_update)

    def hear(self, before: int | None = None) -> None:
        heard = [sent for sent in self._sent if before is None or sent.step < before]
        self._sent = self._sent[len(heard) :]  # in the order of steps
        for sent in heard:
            if sent.arrived is not None:
                sent.arrived.synchronize()  # long past, where the host has read the loss of a later step
            for name, outcome in zip(sent.names, sent.outcomes.tolist(), strict=True):
                if reason := REASONS.get(outcome):
                    self.record.skip(name, sent.step, reason, name in sent.first)
                if outcome != SAMPLED and name in sent.first:
                    self.waiting.add(name)

    def _send(self, names: Sequence[str], outcomes: Tensor, step: int) -> None:
        host = outcomes.to("cpu", non_blocking=True)
        arrived = None
        if outcomes.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent.append(_Sent(names, frozenset(names) & self.waiting, step, host, arrived))

    # --- refreshes -----------------------------------------------------------------------------

    def _refresh_everywhere(
        self, sources: Mapping[str, Source], step: int, lr_factor: float, number: Number
    ) -> Iterator[tuple[str, BasisChange]]:
        self.hear(before=step)
        for names in self._batches(sources, number):
            with phase(Phase.refresh):
                changes = self._refresh_batch({n: sources[n] for n in names}, step, lr_factor, number)
            yield from changes.items()

    def _batches(self, sources: Mapping[str, Source], number: Number) -> Iterator[list[str]]:
        """Names of matrices of one size that are all refreshed for the first time, or all again."""
        alike: dict[Any, list[str]] = {}
        for name, source in sources.items():
            # a sampler that needs the matrices themselves takes them of one shape
            kind = source.kind if self.sampler.needs_gradient else None
            alike.setdefault((self.sizes[name], self._first(name, number), kind), []).append(name)
        for names in alike.values():
            by_kind: dict[Any, list[str]] = {}
            for name in names:
                by_kind.setdefault(sources[name].kind, []).append(name)
            batch: list[str] = []
            held = 0
            for name in (name for own in by_kind.values() for name in own):
                if batch and held + sources[name].elements > BATCH_ELEMENTS:
                    yield batch
                    batch, held = [], 0
                batch.append(name)
                held += sources[name].elements
            yield batch

    def _refresh_batch(
        self, sources: Mapping[str, Source], step: int, lr_factor: float, number: Number
    ) -> dict[str, BasisChange]:
        names = list(sources)
        with self.record.timing(step, self.devices[names[0]]):
            gram = _joined(list(sources.values())) if self.informed(step) else None
            old, new, outcomes = self._sample_batch(names, gram, step, lr_factor, number)
            if outcomes is not None:
                self._send(names, outcomes, step)
        return self._settle_batch(names, old, new, step, number)

    def _sample_batch(
        self, names: Sequence[str], gram: Gram | None, step: int, lr_factor: float, number: Number
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(bases in use; those after the refresh, n×k×r each; outcomes, n, None if there is but one)."""
        old = self._in_use(names)
        request = self._requests(names, [self._seed_of(name, number(name)) for name in names])
        request.gram, request.switched = gram, self._switched(step)
        request.lr_factor = lr_factor * self.lr_share
        if not self._first(names[0], number):
            scale = self._scale_in_use(names[0], old)
            scale = scale.unsqueeze(-2) if isinstance(scale, Tensor) else scale
            request.previous = old / scale if self.scaled else old
        try:
            new = self._sampled(request)
        except torch.linalg.LinAlgError:
            assert gram is not None
            new = torch.full_like(old, torch.nan)
        if gram is None:
            return old, new, None
        sampled = gram.usable & new.isfinite().flatten(1).all(1)
        failed = torch.where(gram.finite, torch.where(gram.usable, FAILED, ZERO), NOT_FINITE)
        return old, new.where(sampled[:, None, None], old), torch.where(sampled, SAMPLED, failed)

    def _in_use(self, names: Sequence[str]) -> Tensor:
        if not self.stored and all(self.seeds[name] < 0 for name in names):
            return self._sampled(self._requests(names, [self.seeds[name] for name in names]))
        return self.together(names)

    def _settle_batch(
        self, names: Sequence[str], old: Tensor, new: Tensor, step: int, number: Number
    ) -> dict[str, BasisChange]:
        changes = {}
        scale = self._scale_in_use(names[0], old)
        for i, name in enumerate(names):
            change = None
            if name not in self.waiting and step != 1:
                own = scale[i] if isinstance(scale, Tensor) else scale
                change = changes[name] = BasisChange(old[i], new[i], own)
            self._note(name, change, step, number(name))
        if self.stored:
            self._keep(names, new.unbind())
        return changes

    def _share(
        self, sources: Mapping[str, Source], step: int, lr_factor: float, number: Number
    ) -> dict[str, BasisChange]:
        """Refresh bases: one rank gathers each matrix, samples its basis and broadcasts it.

        Matrices are sampled one by one, because those that have been are let go.
        """
        names, owners = list(sources), self._owners(sources)
        with self.record.timing(step, self.devices[names[0]]):
            arriving = {name: sources[name].matrix_at(owners[name]) for name in names}
            sampled: dict[str, Tensor] = {}
            outcomes = torch.zeros(len(names), dtype=torch.int64, device=self.devices[names[0]])
            for i, name in enumerate(names):
                matrix = arriving.pop(name)()
                if matrix is not None:
                    gram = sources[name].together([sources[name]], [matrix], whole=True)
                    del matrix
                    _, (sampled[name],), outcome = self._sample_batch([name], gram, step, lr_factor, number)
                    assert outcome is not None
                    outcomes[i] = outcome[0]
            dist.all_reduce(outcomes)
            for owner in range(dist.get_world_size()):
                if sent := [name for name in names if owners[name] == owner]:
                    sampled |= self._broadcast(sent, owner, sampled)
            self._send(names, outcomes, step)
        changes: dict[str, BasisChange] = {}
        for name in names:
            own = self._in_use([name]), sampled[name].unsqueeze(0)
            changes |= self._settle_batch([name], *own, step, number)
        return changes


def _joined(sources: Sequence[Source]) -> Gram:
    """The Gram matrices of ``sources`` as one batch; those of one kind follow each other."""
    by_kind: dict[Any, list[Source]] = {}
    for source in sources:
        by_kind.setdefault(source.kind, []).append(source)
    grams = [own[0].together(own, [s.matrix() for s in own], whole=False) for own in by_kind.values()]
    return grams[0] if len(grams) == 1 else JoinedGram(grams, [len(own) for own in by_kind.values()])
