"""The GPUs that a plan speaks of, and what their data sheets promise."""

from dataclasses import dataclass

GIB = 2**30
# The CUDA context takes about half of this; the rest is for cuBLAS workspaces and fragmentation.
RESERVED_BYTES = GIB


@dataclass(frozen=True)
class Card:
    """Rates of a data sheet, without sparsity: FLOP/s of matrix products in bfloat16 (sums in float32), in
    float32 without tensor cores' shortened formats, and in float64, with tensor cores where they have it;
    bytes/s of the memory; bytes/s that a GPU sends to the others of its node while it receives as much.
    ``size``: of ``SIZES``."""

    name: str
    size: str
    bfloat16: float
    float32: float
    float64: float
    bandwidth: float
    link: float


# The total memory of a GPU in GiB as torch reports it ("total capacity" in its out-of-memory error). Reports
# differ by up to 0.3 with the driver; this is the smallest found. ECC takes a share of an L40S (an A6000 has
# 47.3), and an A10 or L4 of nominally 24 GB has only 22.0.
SIZES = {"24 GB": 23.5, "40 GB": 39.3, "48 GB": 44.3, "80 GB": 79.1, "141 GB": 139.7}

_PCIE, _NVLINK_A100, _NVLINK_H100 = 32e9, 300e9, 450e9
CARDS = (
    Card("RTX 3090", "24 GB", 71e12, 35.6e12, 0.56e12, 936e9, _PCIE),
    Card("RTX 4090", "24 GB", 165e12, 82.6e12, 1.29e12, 1008e9, _PCIE),
    Card("A100-40", "40 GB", 312e12, 19.5e12, 19.5e12, 1555e9, _NVLINK_A100),
    Card("A6000", "48 GB", 155e12, 38.7e12, 0.6e12, 768e9, _PCIE),
    Card("L40S", "48 GB", 362e12, 91.6e12, 1.43e12, 864e9, _PCIE),
    Card("A100-80", "80 GB", 312e12, 19.5e12, 19.5e12, 2039e9, _NVLINK_A100),
    Card("H100", "80 GB", 989e12, 67e12, 67e12, 3350e9, _NVLINK_H100),
    Card("H200", "141 GB", 989e12, 67e12, 67e12, 4800e9, _NVLINK_H100),
)


@dataclass(frozen=True)
class Gpu:
    size: str
    examples: str
    usable: int  # bytes


GPUS = tuple(
    Gpu(size, ", ".join(card.name for card in CARDS if card.size == size), int(total * GIB) - RESERVED_BYTES)
    for size, total in SIZES.items()
)
