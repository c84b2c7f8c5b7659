"""How many kernels a GPU is asked for by an operation of torch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# No kernel: memory alone, or a value on its way to the host.
_NO_KERNEL = ("empty", "new_empty", "_local_scalar_dense", "set_", "resize_", "record_stream", "is_same_size")
# About how many kernels an operation is that is more than one: cuSOLVER's for each matrix, others a call.
PER_MATRIX = {"linalg_qr": 60, "_linalg_eigh": 200, "_linalg_svd": 300, "linalg_householder_product": 30}
PER_PANEL = {"linalg_cholesky_ex": 3, "linalg_solve_triangular": 2}  # of 32 columns, for a whole batch
_PER_CALL = {"sort": 4, "argsort": 4, "topk": 4, "embedding_dense_backward": 8, "linalg_vector_norm": 2}
# From ATen's MultiTensorApply.cuh: tensors of one launch by the number of lists, elements of a chunk,
# and blocks of one launch.
_TENSORS_OF_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_CHUNK_ELEMENTS, _BLOCKS_OF_LAUNCH = 65536, 320


def operation_name(func: Any) -> str:
    """Of the operation, without its namespace and overload."""
    return str(func._schema.name.split("::")[1])


def is_free(func: Any, name: str) -> bool:
    """Does the operation take no kernel? Views do not."""
    if func.namespace in ("prim", "profiler") or func.is_view or name.startswith(_NO_KERNEL):
        return True
    return name in ("lift_fresh", "_unsafe_view", "_reshape_alias", "detach")


def launches_of(name: str, args: Any, inputs: Sequence[Tensor]) -> int:
    """``inputs``: the tensors among ``args``."""
    if name.startswith(("_foreach", "_fused")):
        lists = [x for x in args if isinstance(x, list | tuple) and x and isinstance(x[0], Tensor)]
        if not lists:
            return 0
        elements = sum(x.numel() for x in lists[0])
        by_tensors = -(-len(lists[0]) // _TENSORS_OF_LAUNCH[min(5, len(lists))])
        number = max(by_tensors, -(-elements // (_CHUNK_ELEMENTS * _BLOCKS_OF_LAUNCH)))
        return number + (name == "_foreach_norm")
    if name in PER_MATRIX:
        return PER_MATRIX[name] * max(1, inputs[0][..., 0, 0].numel())
    if name in PER_PANEL:
        return PER_PANEL[name] * -(-inputs[0].shape[-1] // 32)
    return _PER_CALL.get(name, 1)
