"""When training ends before its last step, because evaluations get no better."""

import math
from dataclasses import dataclass, replace

from rsotrain.config.data import EvaluationConfig


@dataclass(frozen=True)
class Patience:
    """What early stopping remembers: the ``best`` validation loss that counted as better, and how many
    evaluations have been in vain since (``waited``)."""

    best: float = math.inf
    waited: int = 0

    def after(self, loss: float, config: EvaluationConfig) -> "Patience":
        """After an evaluation of ``loss``."""
        if loss < self.best - config.min_delta:
            return Patience(loss)
        return replace(self, waited=self.waited + 1)

    def ended(self, config: EvaluationConfig) -> str:
        """Why training ends, in words; empty while it goes on."""
        if config.patience is None or self.waited < config.patience:
            return ""
        better = f" by more than {config.min_delta}" if config.min_delta else ""
        return f"{self.waited} evaluations in a row were no better than a loss of {self.best:.4f}{better}"
