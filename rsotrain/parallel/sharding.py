"""Where the pieces of a sharded matrix lie, and the collectives that the pieces need.

FSDP2 shards each weight in one dimension. The optimizer works on local pieces, so it is told by a
``Shard`` which piece of the whole a rank has; a weight that is not sharded is its own only piece.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rsotrain.config.schema import Precision
from rsotrain.parallel import exchange

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_COMPUTE = {Precision.bf16_mixed: torch.bfloat16, Precision.bf16: torch.bfloat16, Precision.fp32: None}


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor, to read and to write; any other tensor itself.

    Asked by attribute: importing DTensor takes a second, which a single process need not spend.
    """
    to_local = getattr(tensor, "to_local", None)
    if to_local is None:
        return tensor
    with torch.no_grad():
        return to_local()


@dataclass(frozen=True)
class Shard:
    """This rank's piece of a tensor of ``shape``: all of it if ``dim`` is None, else [start, stop) there.

    Pieces are those of ``torch.chunk``: all equal but the last ones, which may be empty. ``group``: the
    ranks that have the others, in their order. ``mesh``: of all ranks; None for a single process.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0
    stop: int = 0
    group: dist.ProcessGroup | None = None
    mesh: "DeviceMesh | None" = None

    @property
    def pieces(self) -> int:
        return 1 if self.dim is None else dist.get_world_size(self.group)

    @property
    def chunk(self) -> int:
        """Length of a full piece."""
        assert self.dim is not None
        return -(-self.shape[self.dim] // self.pieces)

    @property
    def piece_shape(self) -> tuple[int, ...]:
        own = self.stop - self.start
        return tuple(own if i == self.dim else size for i, size in enumerate(self.shape))

    @property
    def label(self) -> str:
        """Of the piece: tells it from the others."""
        return "" if self.dim is None else f"@{self.start}"

    def of(self, whole: Tensor) -> Tensor:
        """This rank's view of a tensor that is laid out like the whole."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, self.stop - self.start)

    def sum_(self, partial: Tensor) -> Tensor:
        """Sum over the pieces, in place on every rank."""
        if self.dim is not None:
            dist.all_reduce(partial, group=self.group)
        return partial

    def norms(self, *pieces: Tensor) -> list[Tensor]:
        """Frobenius norms of the wholes, 0-d; for all of them one all-reduce of scalars."""
        norms = [torch.linalg.vector_norm(piece) for piece in pieces]
        if self.dim is None:
            return norms
        return list(self.sum_(torch.stack(norms).square_()).sqrt_())

    def _padded(self, piece: Tensor) -> Tensor:
        assert self.dim is not None
        rows = piece.movedim(self.dim, 0)
        if rows.shape[0] == self.chunk:
            return rows.contiguous()
        padded = rows.new_zeros(self.chunk, *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        return padded

    def _whole(self, pieces: list[Tensor]) -> Tensor:
        assert self.dim is not None
        return torch.cat(pieces)[: self.shape[self.dim]].movedim(0, self.dim).contiguous()

    def gather(self, piece: Tensor, owner: int) -> Callable[[], Tensor | None]:
        """Begin to send ``piece``, which must not change before the returned function is called.

        That waits, and returns the whole on the rank ``owner`` of the group, None on the others.
        """
        if self.dim is None:
            return lambda: piece
        padded = self._padded(piece)
        pieces = None
        if dist.get_rank(self.group) == owner:
            pieces = [torch.empty_like(padded) for _ in range(self.pieces)]
        work = dist.gather(padded, pieces, group=self.group, async_op=True, group_dst=owner)
        assert work is not None

        def whole() -> Tensor | None:
            work.wait()
            return None if pieces is None else self._whole(pieces)

        return whole

    def all_gather(self, piece: Tensor) -> Tensor:
        """The whole, on every rank."""
        if self.dim is None:
            return piece
        padded = self._padded(piece)
        pieces = [torch.empty_like(padded) for _ in range(self.pieces)]
        dist.all_gather(pieces, padded, group=self.group)
        return self._whole(pieces)

    def scatter(self, whole: Tensor | None, owner: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """This rank's piece of the whole that ``owner`` has, of this dtype."""
        if self.dim is None:
            assert whole is not None
            return whole
        others = [size for i, size in enumerate(self.shape) if i != self.dim]
        out = torch.empty(self.chunk, *others, device=device, dtype=dtype)
        pieces = None
        if whole is not None:
            rows = whole.movedim(self.dim, 0)
            padded = rows.new_zeros(self.chunk * self.pieces, *others)
            padded[: rows.shape[0]] = rows
            pieces = list(padded.split(self.chunk))
        dist.scatter(out, pieces, group=self.group, group_src=owner)
        return out[: self.stop - self.start].movedim(0, self.dim)


def chunk_bounds(size: int, pieces: int, index: int) -> tuple[int, int]:
    """[start, stop) of piece ``index``, as ``torch.chunk`` divides ``size``."""
    chunk = -(-size // pieces)
    return min(index * chunk, size), min((index + 1) * chunk, size)


def shard_of(parameter: Tensor) -> Shard:
    """The piece of ``parameter`` that is here."""
    mesh: Any = getattr(parameter, "device_mesh", None)
    shape = tuple(parameter.shape)
    if mesh is None:
        return Shard(shape)
    ((group, placement),) = (
        (mesh.get_group(name), placement)
        for name, placement in zip(mesh.mesh_dim_names, parameter.placements, strict=True)  # type: ignore[attr-defined]
        if name == "shard"
    )
    pieces = dist.get_world_size(group)
    if pieces == 1:
        return Shard(shape, mesh=mesh)
    start, stop = chunk_bounds(shape[placement.dim], pieces, dist.get_rank(group))
    return Shard(shape, placement.dim, start, stop, group, mesh)


def sums_of_rows(partials: list[Tensor], shards: list[Shard]) -> list[Tensor]:
    """Sums over the pieces of several tensors of one dtype, by one all-reduce; they may be overwritten.

    ``shards``: of the parameters that they belong to, which are all sharded over the same ranks, or none is.
    """
    if shards[0].dim is None:
        return partials
    flat = shards[0].sum_(torch.cat([partial.flatten() for partial in partials]))
    pieces = flat.split([partial.numel() for partial in partials])
    return [piece.view_as(partial) for piece, partial in zip(pieces, partials, strict=True)]


def preferred_dim(shape: tuple[int, ...], pieces: int, *, rows: bool) -> int:
    """The dimension to shard a weight in: the one that is not projected.

    Low-rank methods project the smaller dimension of a matrix, so the larger one is sharded; FSDP2 cannot
    shard the second dimension unevenly, and the first one is then taken, projected or not. ``rows``: the
    first in any case, for RSO, which always projects the second, and for methods that treat rows one by one.
    """
    if rows or len(shape) != 2 or shape[0] >= shape[1] or shape[1] % pieces:
        return 0
    return 1


def shard_model(
    model: nn.Module,
    blocks: list[nn.Module],
    mesh: "DeviceMesh",
    precision: Precision,
    by_rows: Iterable[nn.Parameter] = (),
) -> None:
    """Shard ``model`` in place: each block is gathered for itself, then all the rest together.

    Weights travel in the compute dtype. Gradients are summed, not averaged, in float32, and the sums stay in
    it, whatever the dtype of the weights. ``by_rows``: the parameters to shard in their first dimension in
    any case.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard as ShardPlacement

    pieces = mesh["shard"].size()
    policy = MixedPrecisionPolicy(
        param_dtype=_COMPUTE[precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )

    rows = {id(parameter) for parameter in by_rows}

    def place(parameter: nn.Parameter) -> ShardPlacement:
        # what is frozen here are the weights that RSO moves along their first dimension
        first = id(parameter) in rows or not parameter.requires_grad
        return ShardPlacement(preferred_dim(tuple(parameter.shape), pieces, rows=first))

    for module in [*blocks, model]:
        fully_shard(
            module,
            mesh=mesh,
            shard_placement_fn=place,
            mp_policy=policy,
            reshard_after_forward=module is not model,
        )
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            if precision is Precision.bf16:
                _keep_sums(part)
    if pieces > 1 and exchange.is_direct(mesh.get_group("shard")):
        exchange.use_in([model, *blocks])


def _keep_sums(module: Any) -> None:
    """Let the reduced gradients of an FSDPModule stay in float32, be its parameters bfloat16 or both.

    FSDP would round them to the dtype of the parameters, of which it wants only one; it has no setting for
    that.
    """
    for group in module._get_fsdp_state()._fsdp_param_groups:
        group._init_mp_dtypes = partial(_init_dtypes, group)


def _init_dtypes(group: Any) -> None:
    """In place of FSDPParamGroup's own, which is called when the parameters have memory."""
    for own in group.fsdp_params:
        own.init_dtype_attrs(group.mp_policy)
        if own.sharded_param.requires_grad:
            own.sharded_param.grad_dtype = torch.float32
    group._orig_dtype, group._reduce_dtype = None, torch.float32
