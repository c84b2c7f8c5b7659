"""The training step and its state. The one clock is ``step``, the number of optimizer updates."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rsotrain.config.methods import LoRAConfig
from rsotrain.config.schema import Config
from rsotrain.data.build import Data
from rsotrain.data.position import order_record, saved_position
from rsotrain.data.sequences import merged_states
from rsotrain.data.targets import IGNORE_INDEX, valid_positions
from rsotrain.errors import NonFiniteError, UserError, require
from rsotrain.instruments.memory import saved_activation_bytes, tensors_bytes
from rsotrain.instruments.phases import Phase, phase
from rsotrain.models.architecture import flops_per_token
from rsotrain.models.build import materialize
from rsotrain.models.compiling import compile_blocks
from rsotrain.models.documents import Documents
from rsotrain.models.fit import Described, first_difference
from rsotrain.models.generation import generate_texts
from rsotrain.models.llama import Llama
from rsotrain.models.lora_linear import is_factor, merged
from rsotrain.optim.build import build_optimizer
from rsotrain.parallel.ranks import World, resolve_device
from rsotrain.parallel.sharding import Shard, local, shard_model, shard_of
from rsotrain.training.bad_steps import BadSteps
from rsotrain.training.evaluation import Between, evaluate, go_on
from rsotrain.training.lr_scheduler import lr_factor
from rsotrain.training.model import model_without_memory

_ALPHA = "adapter_alpha"  # in a checkpoint's record


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean over the valid tokens of the batch, in nats. ``grad_norm``: before clipping. ``tokens``:
    number of valid tokens. All three are of all ranks. ``signals``: sums over ranks of the given signals.
    ``skipped``: why there was no update, and the batch was passed over; empty where there was one."""

    loss: float
    grad_norm: float
    tokens: int
    signals: tuple[float, ...] = ()
    skipped: str = ""


Signals = Callable[[], tuple[float, ...]]


def no_signals() -> tuple[float, ...]:
    return ()


def share_of_batch(batch_size: int, world: World) -> range:
    """The indices within a batch of this rank's sequences."""
    own = batch_size // world.size
    return range(world.rank * own, (world.rank + 1) * own)


class Trainer:
    """Model, optimizer, data order and clock of one run. It does not use folders, loggers or the screen.

    ``train_step`` is exactly one optimizer update, or a bad batch that is skipped; ``state_dict`` holds all
    that an exact resume needs. Each rank has a Trainer. All ranks call its methods together, and each batch
    is divided among them. ``model``: the result of ``model_without_memory``, if the caller has built it
    already.
    """

    def __init__(
        self, config: Config, data: Data, world: World | None = None, model: Llama | None = None
    ) -> None:
        self.config = config
        self.data = data
        self.world = world or World(resolve_device(config.device))
        self.device = self.world.device
        self.model = model or model_without_memory(config, data.tokenizer)
        self.vocab_size = self.model.lm_head.weight.shape[0]
        self.optimizer = build_optimizer(
            self.model,
            config.optimizer,
            config.sampler,
            precision=config.precision,
            seed=config.seed,
            total_steps=config.steps,
            place=self._place,
        )
        if (config.micro_batch_size or self._batch_size_of_rank) < self._batch_size_of_rank:
            for holder in self.optimizer.gradient_holders():  # of bfloat16 weights, too: sums are in float32
                holder.grad_dtype = torch.float32
        if config.compile:
            compile_blocks(self.model)
        self.order = data.train.order(config.seed)
        self.step = 0
        self.tokens = 0  # targets so far, without ignored ones
        self.position = 0  # number of sequences taken from the data so far, with those that were skipped
        self.bad_steps = BadSteps(
            config.max_bad_steps, config.spike_factor, updated=config.optimizer.update_in_backward
        )
        self.last_lr: float | None = None  # of the last update; None where nobody knows
        self.before_update: Callable[[], None] = lambda: None  # called before each change of weights or state
        self.gradients_bytes = 0
        self.saved_activations_bytes: int | None = None

    def _place(self, model: nn.Module, by_rows: Iterable[nn.Parameter]) -> None:
        """Shard a model that has no memory yet, then give it memory and weights."""
        assert isinstance(model, Llama)
        if self.world.mesh is not None:
            layers = list(model.model.layers)
            shard_model(model, layers, self.world.mesh, self.config.precision, by_rows)
        materialize(model, self.device, self.config.seed)

    @property
    def lr(self) -> float:
        """Learning rate of the next update for embedding, head and norms."""
        return self.lr_of(self.step)

    def lr_of(self, step: int) -> float:
        """Learning rate of the update with 0-based index ``step``."""
        return self.config.optimizer.lr * self._lr_factor(step)

    def _lr_factor(self, step: int) -> float:
        scheduled = lr_factor(self.config.lr_scheduler, step, self.config.steps)
        return scheduled * self.optimizer.rate_factor(step + 1)

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.model, self.config.seq_len)

    @property
    def _batch_size_of_rank(self) -> int:
        return self.config.batch_size // self.world.size

    def micro_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's share of the next batch, whose sequences do not depend on the number of ranks."""
        share = share_of_batch(self.config.batch_size, self.world)
        indices = self.order.indices(self.position, self.config.batch_size)[share.start : share.stop]
        size = self.config.micro_batch_size or len(share)
        batches = [self.data.train.batch(indices[i : i + size]) for i in range(0, len(share), size)]
        if self.device.type == "cuda":  # copies from pinned memory do not block the host
            return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batches]
        return batches

    def train_step(self, signals: Signals = no_signals) -> StepResult:
        """One optimizer update, or none where the batch is bad and may be skipped.

        The loss is the sum over all micro-batches of all ranks divided by their number of valid tokens, so
        that gradient accumulation over k micro-batches, or k ranks, gives the update of one batch.
        ``signals`` is called before the update, and its results are summed over ranks. A batch that is
        skipped changes neither weights nor optimizer state nor the clock: the next call takes the next batch
        for the same step. Raises NonFiniteError before the update, or after it where it is a part of the
        backward pass (``optimizer.update_in_backward``).
        """
        batches = self.micro_batches()
        tokens = sum(int((targets != IGNORE_INDEX).sum()) for _, targets in batches)
        tokens = int(self.world.sum([tokens])[0])
        total = torch.zeros((), device=self.device)
        self.optimizer.set_lr_factor(self._lr_factor(self.step))
        if self.optimizer.in_backward is not None:
            self.before_update()
        for i, (inputs, targets) in enumerate(batches):
            if self.world.mesh is not None:  # replicas reduce once, after all micro-batches
                self.model.set_requires_all_reduce(i == len(batches) - 1)  # type: ignore[operator]
            with phase(Phase.forward):
                loss = self.forward(inputs, targets) / tokens
            with phase(Phase.backward), self.optimizer.backward_pass():
                loss.backward()
                total += loss.detach()
        with phase(Phase.optimizer_step):
            self.optimizer.reduce_gradients()
            finished = self._finish_gradients(total, signals)
        loss_value, norm_value, *answers = finished.tolist()  # one host sync
        try:
            bad = self.bad_steps.verdict(self.step + 1, loss_value, norm_value)
        except NonFiniteError:
            self.optimizer.zero_grad()
            raise
        if bad:
            self.optimizer.zero_grad()
            self.position += self.config.batch_size
            return StepResult(loss_value, norm_value, tokens, tuple(answers), skipped=bad)
        with phase(Phase.optimizer_step):
            self.before_update()
            self.optimizer.step()
        self.last_lr = self.lr
        if self.gradients_bytes == 0:
            self.gradients_bytes = self.optimizer.gradients_bytes()
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += tokens
        self.position += self.config.batch_size
        return StepResult(loss_value, norm_value, tokens, tuple(answers))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The summed loss of one micro-batch of the step, on the device."""
        valid_mask = self.valid_mask(targets)
        if valid_mask is not None:
            valid_mask = valid_mask.to(self.device, non_blocking=True)
        documents = self.documents(inputs)
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        with self.optimizer.observing(valid_mask):
            if self.saved_activations_bytes is not None:
                return self.model(inputs, targets, documents)
            with saved_activation_bytes(self.live_tensors()) as saved:  # once, on the first micro-batch
                loss = self.model(inputs, targets, documents)
            self.saved_activations_bytes = saved.total
            return loss

    def live_tensors(self) -> list[torch.Tensor]:
        """Parameters and optimizer state of this rank."""
        return [*self.model.parameters(), *self.optimizer.state_tensors()]

    def documents(self, inputs: torch.Tensor) -> Documents | None:
        """Of one micro-batch, where attention stays inside them by these; a plan replaces it."""
        return self.model.model.documents(inputs, self.device)

    def valid_mask(self, targets: torch.Tensor) -> torch.Tensor | None:
        """``valid_positions`` of one micro-batch; a plan replaces it."""
        return valid_positions(targets)

    def _finish_gradients(self, loss: torch.Tensor, signals: Signals) -> torch.Tensor:
        """(loss, global 2-norm of the gradients, signals…), summed over ranks; then clip to ``grad_clip``.

        The norm is in float32 and of the gradients before clipping.
        """
        norm = torch.linalg.vector_norm(torch.stack(self.optimizer.gradient_norms()))
        if self.world.size == 1:
            result = torch.stack([loss, norm, *(loss.new_full((), s) for s in signals())])
        else:
            mesh = self.world.mesh
            assert mesh is not None
            replicas = self.world.size // mesh["shard"].size()  # each piece is on so many ranks
            own = torch.stack([loss.double(), norm.double().square() / replicas])
            result = torch.cat([own, *(own.new_full((1,), s) for s in signals())])
            dist.all_reduce(result)
            result[1].sqrt_()
            norm = result[1].to(norm.dtype)
        if self.config.grad_clip is not None:
            self.optimizer.clip_(norm, self.config.grad_clip)
        return result

    def evaluate(self, between: Between = go_on) -> dict[str, float]:
        """Validation metrics of the current weights; ``between``: called before each batch; may raise."""
        config, validation = self.config, self.data.validation
        size = config.evaluation.micro_batch_size or config.micro_batch_size or self._batch_size_of_rank
        try:
            return evaluate(
                self.model,
                validation.evaluation_batches(size, config.evaluation.max_tokens),
                self.world,
                bytes_per_token=self._validation_bytes_per_token,
                legacy_divisor=config.evaluation.legacy_divisor,
                between=between,
            )
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Free the weights that forward passes without a backward pass have gathered."""
        if self.world.mesh is not None:
            self.model.reshard()  # type: ignore[operator]

    def generate(self, between: Between = go_on) -> list[tuple[str, str]]:
        """(prompt, continuation) for each of ``generate.prompts``; ``between``: called before each token."""
        config = self.config
        try:
            return generate_texts(
                self.model,
                self.data.tokenizer,
                config.generate,
                max_context=config.model.max_position_embeddings,
                device=self.device,
                seed=config.seed,
                between=between,
            )
        finally:
            self._reshard()

    @cached_property
    def _validation_bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each target within ``evaluation.max_tokens``."""
        validation, limit = self.data.validation, self.config.evaluation.max_tokens
        num_bytes = validation.num_target_bytes(self.data.tokenizer.decode, limit)
        return num_bytes / validation.num_targets(limit)

    def memory(self) -> dict[str, int]:
        """Bytes on this rank by kind. Loggers measure the peak memory of the process themselves."""
        return {
            "memory/parameters_bytes": tensors_bytes(self.model.parameters()),
            "memory/gradients_bytes": self.gradients_bytes,
            "memory/optimizer_state_bytes": self.optimizer.state_bytes(),
            "memory/saved_activations_bytes": self.saved_activations_bytes or 0,
        }

    def state_dict(self) -> dict[str, Any]:
        """``model`` and ``optimizer``: this rank's piece of each tensor by name, as ``shards`` describes it.

        ``trainer``: values that JSON can hold, the same on every rank.
        """
        train = self.data.train
        data = merged_states(self.world.gathered(train.state_dict(self.position)))
        named = self.model.named_parameters()  # tied weights once
        return {
            "model": {name: local(p).detach() for name, p in named},
            "optimizer": self.optimizer.state_dict(),
            "trainer": {
                "step": self.step,
                "tokens": self.tokens,
                "sequences": self.position,
                "order": order_record(train, self.config.seed),
                "data": data,
                "lr": self.last_lr,
                **self._adapter_record(),
                **self.bad_steps.state_dict(),
            },
        }

    def _adapter_record(self) -> dict[str, float]:
        """How much the adapters among the weights count; nothing where there are none."""
        own = self.config.optimizer
        return {_ALPHA: own.alpha} if isinstance(own, LoRAConfig) else {}

    def shards(self) -> dict[str, Shard]:
        """Which piece of the whole each tensor of ``state_dict`` is, by name; the others are whole."""
        shards = {name: shard_of(p) for name, p in self.model.named_parameters()}
        return {name: s for name, s in (shards | self.optimizer.shards()).items() if s.dim is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError and changes no tensor if ``state`` is of another model, optimizer or data.

        Training continues with the sequence after the last one taken, whatever the batch size was.
        """
        position = saved_position(state["trainer"], self.data.train, self.config.batch_size)
        saved, own = state["trainer"].get(_ALPHA), self._adapter_record().get(_ALPHA)
        require(
            saved == own or None in (saved, own),  # then names differ, too
            f"the checkpoint's adapters have α={saved}, which optimizer.alpha={own} would not mean; give the"
            " same, or take its weights alone with checkpoint.load=weights",
        )
        self._check_weights(state["model"], same_dtype=True)
        bad_steps = self.bad_steps.restored(state["trainer"])
        self.data.train.load_state_dict(state["trainer"].get("data", {}), position)
        self.optimizer.load_state_dict(state["optimizer"])  # refuses before it changes anything
        self._copy_weights(state["model"])
        self.position, self.bad_steps = position, bad_steps
        self.last_lr = state["trainer"].get("lr")
        self.step = state["trainer"]["step"]
        self.tokens = state["trainer"]["tokens"]

    def load_weights(self, weights: Mapping[str, torch.Tensor], adapter_alpha: float | None = None) -> None:
        """Load weights alone, of any dtype, for a new run; UserError if they are of another model.

        ``adapter_alpha``: α of the adapters among them, which are whole, and are merged; those of this run
        stay as they begin.
        """
        shards = {name: shard_of(p) for name, p in self.model.named_parameters()}
        if adapter_alpha is not None:
            weights = merged(weights, adapter_alpha, shards)
        self._check_weights(weights, same_dtype=False)
        self._copy_weights(weights)

    def _check_weights(self, saved: Mapping[str, torch.Tensor], *, same_dtype: bool) -> None:
        shards = {name: shard_of(p) for name, p in self.model.named_parameters()}

        def described(name: str, tensor: torch.Tensor) -> Described:
            """(shape of the whole, dtype). A saved tensor of this rank's piece's shape is such a piece."""
            shard, shape = shards.get(name), tuple(tensor.shape)
            if shard is not None and shape == shard.piece_shape and not tensor.is_meta:
                shape = shard.shape
            return shape, tensor.dtype if same_dtype else None

        named = self.model.named_parameters()
        here = {name: described(name, local(p)) for name, p in named if same_dtype or not is_factor(name)}
        there = {name: described(name, tensor) for name, tensor in saved.items()}
        if difference := first_difference(here, there):
            raise UserError(f"the checkpoint is of another model: {difference}; give the model it is of")

    @torch.no_grad()
    def _copy_weights(self, saved: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            if name in saved:
                local(parameter).copy_(saved[name])
