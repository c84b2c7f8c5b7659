"""Whether the same step gives the same bits again."""

import os

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read when cuBLAS is first used


def settle(deterministic: bool) -> None:
    """Take kernels whose sums are in one order, in this process from now on, or whichever are fastest.

    A kernel that has no such form goes on as it is, with a warning of torch's.
    """
    if deterministic:
        os.environ.setdefault(_CUBLAS, ":4096:8")
        # torch's aid to find uses of memory that nothing was written to, which costs time
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (untyped)
    if deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic, warn_only=True)


def resume_in_words(device: torch.device, deterministic: bool) -> str:
    """How exact a resume is on ``device``, for a line of the log."""
    if device.type == "cpu":
        return "a resume is bitwise, with as many threads"
    if deterministic:
        return "a resume is bitwise on this kind of GPU, as deterministic=true"
    return "a resume is exact but for rounding, as kernels add in any order; deterministic=true: bitwise"
