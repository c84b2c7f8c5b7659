"""GaLore with the ε of its authors' code and of packages that follow it."""

from dataclasses import replace

from torch import Tensor

from rsotrain.optim.galore import GaLore
from rsotrain.optim.matrix import Matrix


class UncorrectedEps(GaLore):
    """Divides by √V + ε before the bias correction: (√V + ε)/√(1−β₂ᵗ) = √V̂ + ε/√(1−β₂ᵗ)."""

    def negative_updates(self, bucket: list[Matrix], projected: list[Tensor], step: int) -> list[Tensor]:
        own = self.settings
        self.settings = replace(own, eps=own.eps / (1.0 - own.betas[1] ** step) ** 0.5)
        try:
            return super().negative_updates(bucket, projected, step)
        finally:
            self.settings = own
