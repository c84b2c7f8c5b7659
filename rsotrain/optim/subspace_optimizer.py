"""The step that all low-rank methods but RSO share: refresh bases, project gradients, apply the method."""

from abc import abstractmethod
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.choices import OnRefresh
from rsotrain.config.methods import SubspaceConfig
from rsotrain.instruments.devices import device_kind
from rsotrain.optim.base import ParamGroupOptimizer, Settings, gradient_of
from rsotrain.optim.buckets import buckets, chosen
from rsotrain.optim.functional import transport_momentum_
from rsotrain.optim.matrix import Matrix, matrix_of
from rsotrain.optim.moments import work_dtype
from rsotrain.optim.stacks import add_lifted_, is_copy, products, stacked
from rsotrain.optim.state_size import Weight, WeightsLayout
from rsotrain.optim.with_bases import OptimizerWithBases, Subspace, require_orthonormal, require_sampler
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.batches import bases_on
from rsotrain.subspace.orthonormal import orthonormalised
from rsotrain.subspace.projection import oriented, project_, resolve_rank
from rsotrain.subspace.samplers import Sampler
from rsotrain.subspace.sources import GradientSource, Source


@dataclass(frozen=True)
class Stack:
    """n matrices of one shape, with their bases (n, k, r), this rank's rows of them.

    ``tensors``: those that a method has given for each matrix, (n, …).
    """

    matrices: list[Matrix]
    basis: Tensor
    tensors: tuple[Tensor, ...]

    @property
    def first(self) -> Matrix:
        """One of them, for all that they have in common."""
        return self.matrices[0]


class SubspaceOptimizer(OptimizerWithBases):
    """The base of methods with one low-rank basis for each matrix.

    A method defines ``add_state``, ``apply``, ``basis_changed`` and ``matrix_state``. Matrices are updated in
    buckets, whose elementwise work in the subspace runs in fused or foreach calls. On a GPU a bucket has
    matrices of one shape, and all its work runs on stacks; on a CPU a stack is one matrix of the bucket.
    ``needs_orthonormal``: the method makes no sense with bases that are not orthonormal.
    """

    needs_orthonormal: ClassVar[bool] = False

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: SubspaceConfig,
        subspace: Subspace,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        self.subspace = subspace
        self.matrices = [
            matrix_of(name, p, resolve_rank(subspace.rank, min(p.shape), name))
            for name, p in parameters.items()
        ]
        self.by_name = {m.name: m for m in self.matrices}
        dtype = next(iter(parameters.values())).dtype
        self.product_dtype = subspace.compute_dtype or work_dtype(dtype)
        self.basis_dtype = work_dtype(dtype) if subspace.sampler.post_update else self.product_dtype
        self.bases = bases_on(
            device_kind(self.matrices[0].parameter.device),
            {m.name: (m.size, m.rank) for m in self.matrices},
            subspace.sampler,
            gap=subspace.gap,
            staggered=subspace.staggered,
            seed=subspace.seed,
            total_steps=subspace.total_steps,
            dtype=self.basis_dtype,
            devices={m.name: m.parameter.device for m in self.matrices},
            numbered=subspace.sampler.numbered,
            mesh=self.matrices[0].shard.mesh,
        )
        for m in self.matrices:
            for key, tensor in self.bases.state[m.name].items():
                self.add_tensor(m.name, key, tensor)
            self.add_state(m)
        if self.in_stacks:
            self.buckets = [[self.by_name[name] for name in stack] for stack in self.stacks]
        else:  # by the sizes of whole matrices, so that all ranks have the same buckets
            self.buckets = buckets(self.matrices, lambda m: max(m.shard.shape) * m.rank)
        self._basis_in_use: tuple[list[Matrix], Tensor] | None = None
        self._gradients_are_copies = False

    @classmethod
    def refuse(cls, config: Any, sampler: Sampler | None) -> None:
        require_orthonormal(config, require_sampler(config, sampler), always=cls.needs_orthonormal)

    @classmethod
    def state_bytes_formula(cls, config: Any, weights: Sequence[Weight], layout: WeightsLayout) -> int:
        if layout.bases_are_optimised:
            layout = replace(layout, basis_bytes=4)
        return super().state_bytes_formula(config, weights, layout)

    def is_replicated(self, name: str, key: str) -> bool:
        """Where the projected dimension is sharded, M×r tensors are replicated."""
        return super().is_replicated(name, key) or matrix_of(name, self.parameters[name]).by_columns

    def joined_keys(self, name: str) -> list[str]:
        return ParamGroupOptimizer.joined_keys(self, name)  # those of the bases, too

    def join_state(self) -> None:
        super().join_state()
        for name, state in self.bases.state.items():
            state.update({key: self.state[name][key] for key in state})

    def refresh_work(self) -> list[tuple[object, str]]:
        return [*super().refresh_work(), (self, "record_energy")]

    # --- what a method defines -----------------------------------------------------------------

    @abstractmethod
    def add_state(self, matrix: Matrix) -> None:
        """Add the method's own state tensors of one matrix, filled with zeros."""

    def begin(self, matrices: list[Matrix]) -> None:
        """What an update does for all ``matrices`` at once, after their refreshes and before ``apply``."""

    @abstractmethod
    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        """Update the weights.

        ``gradients``: A, M×k each, which must not be changed but by ``residual_of``; ``projected``: R = A Q,
        M×r each, which may be.
        """

    def end(self, step: int, lr: float) -> None:
        """What an update does after the last ``apply``."""

    @abstractmethod
    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        """Adapt the moments to the new basis, before the gradient of ``step`` updates them."""

    def momentum_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        """``basis_changed`` of a method with one moment, ``exp_avg`` (M×r): keep, zero or transport it."""
        exp_avg = self.moments[matrix.name]["exp_avg"]
        if self.subspace.on_refresh is OnRefresh.reset:
            exp_avg.zero_()
        elif self.subspace.on_refresh is OnRefresh.transport:
            wide = self.keeper.read([exp_avg])
            transport_momentum_(wide[0], change.transition)
            self.keeper.write([exp_avg], wide, step, "transport")

    def basis(self, matrix: Matrix) -> Tensor:
        """The basis in use, in the dtype of products; the rows that belong to this rank's columns."""
        return matrix.columns_of(self.bases[matrix.name].to(self.product_dtype))

    def stack_kind(self, name: str) -> Hashable:
        return super().stack_kind(name), self.by_name[name].rank

    @property
    def stack_itemsize(self) -> int:
        return self.product_dtype.itemsize

    def stacks_in(self, bucket: list[Matrix], *lists: list[Tensor]) -> Iterator["Stack"]:
        """The stacks of ``bucket``. ``lists``: tensors of each matrix, to be stacked alike."""
        length = max(1, len(bucket)) if self.in_stacks else 1
        for i in range(0, len(bucket), length):
            own = bucket[i : i + length]
            stacks = tuple(stacked(tensors[i : i + length]) for tensors in lists)
            yield Stack(own, self.bases_of(own), stacks)

    def bases_of(self, matrices: list[Matrix]) -> Tensor:
        """``basis`` of each of a stack, (n, k, r)."""
        if self._basis_in_use is not None and self._basis_in_use[0] == matrices:
            return self._basis_in_use[1]
        if len(matrices) == 1:
            return self.basis(matrices[0]).unsqueeze(0)
        names, first = [m.name for m in matrices], matrices[0]
        numbered = self.bases.numbered  # others follow each other in memory, which is a view
        bases = self.bases.together(names) if numbered else stacked([self.bases[name] for name in names])
        bases = bases.to(self.product_dtype)
        return bases[:, first.shard.start : first.shard.stop] if first.by_columns else bases

    def residual_of(self, stack: "Stack", gradients: Tensor, projected: Tensor) -> Tensor:
        """A − lift(R) of each, (n, M, k), in the dtype of products.

        It takes the memory of ``gradients``, A, where this is the stack's own copy.
        """
        residual = gradients.to(stack.basis.dtype, copy=not self._gradients_are_copies)
        add_lifted_(residual, projected, stack.basis, -1.0)
        return residual

    def apply_to(self, stack: "Stack", update: Tensor, lr: float, step: int, scale: float = 1.0) -> None:
        """W ← (1 − ηλ)W + η·scale·update for each matrix; (n, M, k), which may be overwritten."""
        names = [m.name for m in stack.matrices]
        self.apply_stack_(names, update, lr, step, stack.first.side, scale)

    def apply_lifted_to(self, stack: "Stack", update: Tensor, lr: float, step: int) -> None:
        """The same for ``update`` Qᵀ; (n, M, r)."""
        names = [m.name for m in stack.matrices]
        self.apply_lifted_stack_(names, update, stack.basis, lr, step, stack.first.side)

    def gradient(self, matrix: Matrix) -> Tensor:
        """This rank's piece of the oriented tensor that is projected."""
        return oriented(gradient_of(matrix.name, matrix.parameter), matrix.side)

    def sampled_gradient(self, matrix: Matrix, gradient: Tensor, step: int) -> Tensor:
        """The tensor that the sampler uses; ``gradient``: the result of the method ``gradient``."""
        return gradient

    def source(self, matrix: Matrix, gradient: Tensor, step: int) -> Source:
        """Where the sampler finds the Gram matrix; ``gradient``: the result of the method ``gradient``."""
        sampled = partial(self.sampled_gradient, matrix, gradient, step)
        return GradientSource(sampled, matrix.shard, matrix.side, matrix.by_columns)

    # --- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def update_of(self, names: Collection[str], step: int, lr_factor: float) -> None:
        lr = self.peak_lr * lr_factor
        updated = [m for m in self.matrices if m.name in names]
        gradients = {m.name: self.gradient(m) for m in updated}
        self.refresh(gradients, step, lr_factor, after_update=False)
        self.begin(updated)
        for bucket in chosen(self.buckets, names, lambda m: m.name):
            own, projected = [gradients[m.name] for m in bucket], []
            if self.in_stacks:
                stack = stacked(own)
                basis = self.bases_of(bucket)
                projected = list(self._project_all(bucket[0], stack, basis).unbind())
                self._gradients_are_copies = is_copy(stack, own)
                own, self._basis_in_use = list(stack.unbind()), (bucket, basis)
            else:
                projected = [self._project(m, gradients[m.name], self.basis(m)) for m in bucket]
            for m, a, r in zip(bucket, own, projected, strict=True):
                if m.name in self.bases.record.unobserved:
                    self.record_energy(m, a, r)
            self.apply(bucket, own, projected, step, lr)
            self._basis_in_use, self._gradients_are_copies = None, False
        self.end(step, lr)
        if self.subspace.sampler.post_update:
            self.refresh(gradients, step, lr_factor, after_update=True)

    def _project(self, matrix: Matrix, gradient: Tensor, basis: Tensor) -> Tensor:
        """R = A Q in at least float32."""
        dtype = work_dtype(gradient.dtype)
        projected = torch.empty(matrix.num_rows, matrix.rank, dtype=dtype, device=gradient.device)
        project_(projected, gradient, basis)
        return matrix.shard.sum_(projected) if matrix.by_columns else projected

    def _project_all(self, first: Matrix, gradients: Tensor, bases: Tensor) -> Tensor:
        """The same of a stack of matrices like ``first``."""
        dtype = work_dtype(gradients.dtype)
        if gradients.is_cuda and gradients.dtype is bases.dtype is torch.bfloat16:
            product = torch.bmm(gradients, bases, out_dtype=dtype)
        else:
            product = products(gradients.to(bases.dtype), bases).to(dtype)
        return first.shard.sum_(product) if first.by_columns else product

    def record_energy(self, matrix: Matrix, gradient: Tensor, projected: Tensor) -> None:
        """Record the share of the gradient that a new basis captures; called after each refresh."""
        if not self.subspace.sampler.orthonormal:
            basis = orthonormalised(self.bases[matrix.name].to(work_dtype(self.basis_dtype)))
            projected = self._project(matrix, gradient, matrix.columns_of(basis))
        copies = matrix.shard.pieces if matrix.by_columns else 1
        self.bases.record.observe(matrix.name, gradient, projected, copies)

    def refresh(
        self, gradients: dict[str, Tensor], step: int, lr_factor: float, *, after_update: bool
    ) -> None:
        """Refresh the bases that are due before (or after) the update of ``step``."""
        due = [
            m
            for m in self.matrices
            if m.name in gradients and self.bases.due(m.name, step, after_update=after_update)
        ]
        sources = {m.name: self.source(m, gradients[m.name], step) for m in due}
        for name, change in self.bases.refreshed(sources, step, lr_factor):
            self.basis_changed(self.by_name[name], change, step)

    def ranks(self) -> list[int]:
        return [m.rank for m in self.matrices]
