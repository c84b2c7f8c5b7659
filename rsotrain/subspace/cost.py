"""What refreshes cost on a GPU, by a rule of thumb."""

# Half of the operations of an eigendecomposition read a whole matrix for each column, so that memory bounds
# them, and each column is some launches: cuSOLVER's syevd in float64 on an H100, estimated, not measured.
_FLOPS_PER_SECOND = 3e11
_SECONDS_PER_COLUMN = 2e-5


def eigenvectors_seconds(size: int) -> float:
    """Of one symmetric matrix, k×k with k = ``size``: 9k³ operations in k dependent steps."""
    return 9.0 * size**3 / _FLOPS_PER_SECOND + size * _SECONDS_PER_COLUMN
