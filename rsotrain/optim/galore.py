"""Adam in a subspace: GaLore."""

import torch
from torch import Tensor

from rsotrain.config.methods import OnRefresh
from rsotrain.optim.functional import adam_descent, transport_adam_
from rsotrain.optim.subspace_part import Matrix, SubspacePart
from rsotrain.subspace.bases import BasisChange
from rsotrain.subspace.projection import add_lifted_

_MOMENTS = ("exp_avg", "exp_avg_sq")


class GaLore(SubspacePart):
    """Adam on R = A Q; the rest of the gradient is dropped (GaLore, arXiv 2403.03507, algorithm 2).

    N = M̂/(√V̂ + ε);  W ← (1 − ηλ)W − η·lift(N). ε is outside the bias correction, as in the paper's
    text; its code has it inside. I3S and OSD are this with other samplers. At a refresh the moments are
    kept as they are (the paper), zeroed with their step count, or transported to the new basis.
    """

    def initial_state(self, matrix: Matrix) -> dict[str, Tensor]:
        shape = (matrix.num_rows, matrix.rank)
        return {
            "exp_avg": self.keeper.zeros(shape, matrix.parameter),
            "exp_avg_sq": self.keeper.zeros(shape, matrix.parameter),
            "step": torch.zeros((), device=matrix.parameter.device),  # gradients in the moments
        }

    def basis_changed(self, matrix: Matrix, change: BasisChange, step: int) -> None:
        state = self.state[matrix.name]
        if self.subspace.on_refresh is OnRefresh.reset:
            for key in (*_MOMENTS, "step"):
                state[key].zero_()
        elif self.subspace.on_refresh is OnRefresh.transport:
            moments = [state[kind] for kind in _MOMENTS]
            wide = self.keeper.read(moments)
            transport_adam_(wide[0], wide[1], change.transition, state["step"], self.settings.betas)
            labels = [f"{matrix.label}.{kind}.transport" for kind in _MOMENTS]
            self.keeper.write(moments, wide, labels, step)

    def descend(self, bucket: list[Matrix], projected: list[Tensor], step: int) -> list[Tensor]:
        """Take R into the moments; return −N, M×r each."""
        states = [self.state[m.name] for m in bucket]
        counts = [s["step"] for s in states]
        torch._foreach_add_(counts, 1.0)
        moments = [s[kind] for kind in _MOMENTS for s in states]
        wide = self.keeper.read(moments)
        descents = adam_descent(
            projected,
            wide[: len(bucket)],
            wide[len(bucket) :],
            counts,
            betas=self.settings.betas,
            eps=self.settings.eps,
        )
        labels = [f"{m.label}.{kind}" for kind in _MOMENTS for m in bucket]
        self.keeper.write(moments, wide, labels, step)
        return descents

    def apply(
        self, bucket: list[Matrix], gradients: list[Tensor], projected: list[Tensor], step: int, lr: float
    ) -> None:
        descents = self.descend(bucket, projected, step)
        for m, descent in zip(bucket, descents, strict=True):
            add_lifted_(m.weight, descent, self.basis(m), lr, self.kept_share(lr))
