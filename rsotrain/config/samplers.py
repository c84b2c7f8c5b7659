"""The typed settings of samplers, and the code that belongs to them, registered as optimizers are."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from rsotrain.config.choices import BasisStorage
from rsotrain.config.later import later
from rsotrain.config.meanings import means
from rsotrain.config.ranges import SIZE, number
from rsotrain.config.registry import Settings, registering

# Name of the schema -> settings.
SAMPLERS: "dict[str, type[SamplerConfig]]" = {}


def sampler(schema: str, code: str) -> Callable[[Settings], Settings]:
    """Register settings. ``code``: ``module:function`` that builds a Sampler from settings, or empty."""
    return registering(SAMPLERS, schema, code)


@dataclass
class SamplerConfig:
    name: str = means("name of the sampler", MISSING)


@sampler("none", "")
@dataclass
class NoSamplerConfig(SamplerConfig):
    """For optimizers without a subspace."""


class SvdSolver(Enum):
    """gram: eigenvectors of the smaller side's Gram matrix. full: torch.linalg.svd, with its signs."""

    gram = "gram"
    full = "full"


@sampler("svd", "rsotrain.subspace.spectral:svd_sampler")
@dataclass
class SvdConfig(SamplerConfig):
    """The dominant singular vectors (GaLore, arXiv 2403.03507)."""

    solver: SvdSolver = means("how the singular vectors are computed", SvdSolver.gram)
    power_on_gpu: bool = means(
        "on a GPU, two block power iterations from the basis in use instead of solver=gram",
        later(True),
    )


@sampler("importance", "rsotrain.subspace.spectral:importance_sampler")
@dataclass
class ImportanceConfig(SamplerConfig):
    """Singular vectors sampled without replacement, with weights σ ** ``power`` (I3S, arXiv 2502.05790)."""

    power: float = means(
        "exponent of the singular values in the weights of the draw", number(1.0, above=0, at_most=100)
    )


@sampler("randomized_svd", "rsotrain.subspace.spectral:randomized_svd_sampler")
@dataclass
class RandomizedSvdConfig(SamplerConfig):
    """``rounds`` block power iterations from the basis in use, and two more at the first refresh."""

    rounds: int = means(
        "power iterations for a draw; the first has two more",
        number(2, at_least=1, at_most=100),
        unit="iterations",
    )


@sampler("block_power", "rsotrain.subspace.spectral:block_power_sampler")
@dataclass
class BlockPowerConfig(RandomizedSvdConfig):
    """``rounds`` block power iterations from the basis in use, one as in LDAdam (arXiv 2410.16103)."""

    rounds: int = means("power iterations for a draw", number(1, at_least=1, at_most=100), unit="iterations")
    svd_first: bool = means(
        "svd for the first draw, as in LDAdam's code, not a random basis and two more iterations",
        later(True, before=False),
    )


@sampler("mixture", "rsotrain.subspace.spectral:mixture_sampler")
@dataclass
class MixtureConfig(SamplerConfig):
    """svd for ``principal_fraction`` of the rank, haar in its orthogonal complement for the others.

    ``unbiased``: where bases are scaled (``optimizer.basis_scale``), the random columns alone are multiplied,
    by √((k−r₁)/r₂), which gives E[PPᵀ] = I (PRAC, arXiv 2602.23111); false: all columns by √(k/r).
    """

    principal_fraction: float = means("share of the rank that svd fills", number(0.5, at_least=0, at_most=1))
    unbiased: bool = means(
        "where bases are scaled, scale the random columns alone, for E[PPᵀ] = I", later(True, before=False)
    )
    power_on_gpu: bool = means(
        "on a GPU, two block power iterations from the basis in use instead of eigenvectors",
        later(True),
    )


@sampler("haar", "rsotrain.subspace.random_bases:haar_sampler")
@dataclass
class HaarConfig(SamplerConfig):
    """A uniformly random orthonormal basis."""


@sampler("gaussian", "rsotrain.subspace.random_bases:gaussian_sampler")
@dataclass
class GaussianConfig(SamplerConfig):
    """A basis of independent N(0, 1/rank) entries, which is not orthonormal but has E[PPᵀ] = I."""


@sampler("coordinate", "rsotrain.subspace.random_bases:coordinate_sampler")
@dataclass
class CoordinateConfig(SamplerConfig):
    """A basis of random coordinate axes."""


@sampler("topk_norm", "rsotrain.subspace.spectral:topk_norm_sampler")
@dataclass
class TopkNormConfig(SamplerConfig):
    """The coordinate axes along which the gradient has the largest norm."""


@sampler("row_norm", "rsotrain.subspace.spectral:row_norm_sampler")
@dataclass
class RowNormConfig(SamplerConfig):
    """Coordinate axes drawn by the gradient's norm along them, ** ``power`` (Grass, arXiv 2406.17660)."""

    power: float = means(
        "exponent of the norms in the weights of the draw", number(1.0, above=0, at_most=100)
    )


@sampler("dct", "rsotrain.subspace.spectral:dct_sampler")
@dataclass
class DctConfig(SamplerConfig):
    """The columns of a cosine transform along which the gradient has the largest norm (DCT-AdamW)."""

    storage: BasisStorage = means(
        "how bases are kept: as they are, as RSO does in any case, or as the numbers of their columns",
        later(BasisStorage.regenerated, before=BasisStorage.stored),
    )


@sampler("srht", "rsotrain.subspace.random_bases:srht_sampler")
@dataclass
class SRHTConfig(SamplerConfig):
    """Random columns of a Hadamard (times cosine) matrix with random signs; orthonormal."""


class PCASolver(Enum):
    adam = "adam"
    sgd = "sgd"


@sampler("online_pca", "rsotrain.subspace.online_pca:online_pca_sampler")
@dataclass
class OnlinePCAConfig(SamplerConfig):
    """A step of online PCA at each refresh, after the update of the weights (OSD, arXiv 2408.12857)."""

    lr: float = means(
        "peak rate of the basis, which follows the run's schedule", number(0.005, at_least=0, at_most=1000)
    )
    penalty: float = means("λ, weight of ‖PᵀP − I‖²", number(0.1, at_least=0, at_most=10**6))
    solver: PCASolver = means("update rule of the basis", PCASolver.adam)
    orthonormalize: bool = means("also orthonormalise the basis after each step, unlike the paper", False)
    weight_decay: float | None = means(
        "decoupled weight decay of the basis; null: optimizer.weight_decay, the paper's λᴾ = λᵂ",
        later(number(None, at_least=0, at_most=1000), before=0.0),
    )


@sampler("switching", "rsotrain.subspace.spectral:switching_sampler")
@dataclass
class SwitchingConfig(SamplerConfig):
    """The ``leading`` directions by one power iteration, random ones outside the rest (arXiv 2502.07752)."""

    leading: int = means(
        "leading directions that a switch keeps", number(40, at_least=0, at_most=SIZE), unit="directions"
    )


@sampler("golore", "rsotrain.subspace.spectral:golore_sampler")
@dataclass
class GoLoreConfig(SamplerConfig):
    """svd, then haar in the last ``random_fraction`` of the steps (GoLore, arXiv 2410.11289)."""

    random_fraction: float = means(
        "share of the training, at its end, with random bases", number(0.2, at_least=0, at_most=1)
    )
    power_on_gpu: bool = means(
        "on a GPU, two block power iterations from the basis in use instead of eigenvectors",
        later(True),
    )
