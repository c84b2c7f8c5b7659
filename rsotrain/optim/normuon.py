"""NorMuon: Muon's update with rows of one size (Li et al., arXiv 2510.05491)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rsotrain.config.methods import OptimizerConfig
from rsotrain.optim.base import Settings
from rsotrain.optim.muon import Muon
from rsotrain.optim.stacks import put_back_, stacked
from rsotrain.optim.state_size import MatrixSize, StateSize
from rsotrain.parallel.sharding import local

ROW_EPS = 1e-8  # beside the root of a row's mean square, which is about 1/n


class NorMuon(Muon):
    """v_i ← β₂v_i + (1−β₂)·mean_j O_ij²;  U = O/√v · ‖O‖_F/‖O/√v‖_F, with Muon's orthogonalised O.

    W ← (1 − ηλ)W − 0.2·√max(m, n)·ηU. The rows (outputs) of a matrix are on one rank each, so that only the
    two norms are summed over ranks.
    """

    by_rows: ClassVar = True

    def __init__(
        self,
        label: str,
        parameters: dict[str, nn.Parameter],
        peak_lr: float,
        settings: Settings,
        config: OptimizerConfig,
    ) -> None:
        super().__init__(label, parameters, peak_lr, settings, config)
        for name, parameter in parameters.items():
            rows = local(parameter).shape[0]
            self.add_moment(name, "row_sq", (rows, 1), self.shards[name].dim)

    @classmethod
    def matrix_state(cls, config: Any, matrix: MatrixSize) -> StateSize:
        return StateSize((matrix.piece, (matrix.piece[0], 1)))

    def _move(self, names: list[str], updates: Tensor, step: int, lr: float) -> None:
        decay, columns = self.config.row_decay, updates.shape[-1]
        kept = [self.moments[name]["row_sq"] for name in names]
        wide = self.keeper.read(kept)
        averages = stacked(wide)
        # of the rows of O, and of those of O/√v
        norms = averages.new_empty(len(names), 2, averages.shape[1])
        torch.linalg.vector_norm(updates, dim=-1, dtype=norms.dtype, out=norms[:, 0])
        rows = norms[:, 0].unsqueeze(-1)
        averages.mul_(decay).addcmul_(rows, rows, value=(1.0 - decay) / max(1, columns))
        divisors = averages.sqrt().add_(ROW_EPS)
        put_back_(wide, averages)
        self.keeper.write(kept, wide, step)
        torch.div(rows, divisors, out=norms[:, 1].unsqueeze(-1))
        # their squares are on the diagonal, beside which the least number makes 0/0 a 1
        squares = torch.baddbmm(self.one, norms, norms.mT, beta=torch.finfo(norms.dtype).tiny)
        before, after = self.shards[names[0]].sum_(squares).diagonal(dim1=1, dim2=2).unbind(1)
        factors = (before / after).sqrt_().view(-1, 1, 1)
        super()._move(names, updates * (factors / divisors), step, lr)
