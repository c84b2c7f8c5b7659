"""The training loop. One clock: ``step`` counts optimizer updates, and everything is driven by it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from rsotrain.config import Config, Device
from rsotrain.data.build import Data
from rsotrain.errors import TrainingError, UserError
from rsotrain.evaluation import IGNORE_INDEX, evaluate
from rsotrain.flops import training_flops_per_token
from rsotrain.generation import generate_texts
from rsotrain.lr_scheduler import lr_factor
from rsotrain.memory.measure import saved_activation_bytes, tensors_bytes
from rsotrain.models.build import build_model, model_vocab_size
from rsotrain.optim.build import build_optimizer


class NonFiniteError(TrainingError):
    """Loss or gradient norm is not a number; the weights are still those before the update."""


@dataclass(frozen=True)
class StepResult:
    """``loss``: mean nats per valid token of the batch. ``grad_norm``: before clipping."""

    loss: float
    grad_norm: float
    tokens: int


def resolve_device(device: Device) -> torch.device:
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device here; use device=cpu or device=auto")
    if device is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def check_composition(config: Config) -> None:
    """Refuse, before any data is read, what cannot be composed: device, model, optimizer and sampler.

    Builds model and optimizer on the meta device, which takes no memory. Raises UserError.
    """
    resolve_device(config.device)
    model = build_model(
        config.model,
        vocab_size=config.model.vocab_size or 1,
        precision=config.precision,
        device=torch.device("meta"),
        seed=config.seed,
    )
    build_optimizer(
        model,
        config.optimizer,
        config.sampler,
        precision=config.precision,
        seed=config.seed,
        total_steps=config.steps,
    )


class Trainer:
    """Model, optimizer, data order and clock of one run; knows nothing of folders, loggers or screens.

    ``train_step`` is exactly one optimizer update, ``state_dict`` all that an exact resume needs.
    """

    def __init__(self, config: Config, data: Data) -> None:
        self.config = config
        self.data = data
        self.device = resolve_device(config.device)
        self.vocab_size = model_vocab_size(config.model, data.tokenizer.vocab_size)
        self.model = build_model(
            config.model,
            vocab_size=self.vocab_size,
            precision=config.precision,
            device=self.device,
            seed=config.seed,
            activation_checkpointing=config.activation_checkpointing,
            separator_id=data.tokenizer.eos_id if config.data.document_mask else None,
        )
        self.optimizer = build_optimizer(
            self.model,
            config.optimizer,
            config.sampler,
            precision=config.precision,
            seed=config.seed,
            total_steps=config.steps,
        )
        if config.compile:
            for block in self.model.model.layers:
                block.compile()
        self.order = data.train.order(config.seed)
        self.parameters = self.optimizer.gradient_holders()
        self.step = 0
        self.tokens = 0  # predicted so far, ignored positions not counted
        self.gradients_bytes = 0
        self.saved_activations_bytes: int | None = None

    @property
    def lr(self) -> float:
        """Learning rate of the next update, for the parameters outside the blocks."""
        return self.config.optimizer.lr * self._lr_factor()

    def _lr_factor(self) -> float:
        return lr_factor(self.config.lr_scheduler, self.step, self.config.steps)

    @property
    def flops_per_token(self) -> int:
        return training_flops_per_token(self.config.model, self.vocab_size, self.config.seq_len)

    def _micro_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        indices = self.order.indices(self.step, self.config.batch_size)
        size = self.config.micro_batch_size or self.config.batch_size
        for start in range(0, len(indices), size):
            yield self.data.train.batch(indices[start : start + size])

    def train_step(self) -> StepResult:
        """One optimizer update.

        The loss is the sum over all micro-batches divided by their number of valid tokens, so that
        k micro-batches give the update of one batch. Raises NonFiniteError before the update.
        """
        batches = list(self._micro_batches())
        tokens = sum(int((targets != IGNORE_INDEX).sum()) for _, targets in batches)
        total = torch.zeros((), device=self.device)
        for inputs, targets in batches:
            loss = self._forward(inputs, targets) / tokens
            loss.backward()
            total += loss.detach()
        grad_norm = self._clip_gradients()
        loss_value, norm_value = torch.stack([total, grad_norm]).tolist()  # the step's one host sync
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.optimizer.zero_grad()
            raise NonFiniteError(
                f"step {self.step + 1}: the loss is {loss_value} and the gradient norm {norm_value}"
            )
        self.optimizer.set_lr_factor(self._lr_factor())
        self.optimizer.step()
        if self.gradients_bytes == 0:
            self.gradients_bytes = tensors_bytes(p.grad for p in self.parameters)
        self.optimizer.zero_grad()
        self.step += 1
        self.tokens += tokens
        return StepResult(loss_value, norm_value, tokens)

    def _forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        with self.optimizer.observing():
            if self.saved_activations_bytes is not None:
                return self.model(inputs, targets)
            with saved_activation_bytes(self.model) as saved:  # once, on the first micro-batch
                loss = self.model(inputs, targets)
            self.saved_activations_bytes = saved.total
            return loss

    def _clip_gradients(self) -> torch.Tensor:
        """Global 2-norm of the gradients, fp32, before they are scaled down to ``grad_clip``."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if self.config.grad_clip is not None:
            factor = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, factor)
        return norm

    def evaluate(self) -> dict[str, float]:
        """Validation metrics at the present weights."""
        config, validation = self.config, self.data.validation
        size = config.evaluation.micro_batch_size or config.micro_batch_size or config.batch_size
        return evaluate(
            self.model,
            validation.evaluation_batches(size, config.evaluation.max_tokens),
            self.device,
            bytes_per_token=self._validation_bytes_per_token,
        )

    def generate(self) -> list[tuple[str, str]]:
        """(prompt, continuation) for each of ``generate.prompts``."""
        config = self.config
        return generate_texts(
            self.model,
            self.data.tokenizer,
            config.generate,
            max_context=config.model.max_position_embeddings,
            device=self.device,
            seed=config.seed,
        )

    @cached_property
    def _validation_bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each scored token of what ``evaluation.max_tokens`` leaves."""
        validation, limit = self.data.validation, self.config.evaluation.max_tokens
        num_bytes = validation.num_target_bytes(self.data.tokenizer.decode, limit)
        return num_bytes / validation.num_targets(limit)

    def memory(self) -> dict[str, int]:
        """Bytes by part; peak memory is the process's and is measured by whoever logs it."""
        return {
            "memory/parameters_bytes": tensors_bytes(self.model.parameters()),
            "memory/gradients_bytes": self.gradients_bytes,
            "memory/optimizer_state_bytes": self.optimizer.state_bytes(),
            "memory/saved_activations_bytes": self.saved_activations_bytes or 0,
        }

    def state_dict(self) -> dict[str, Any]:
        """``model`` and ``optimizer``: flat name -> tensor. ``trainer``: what JSON can hold."""
        return {
            "model": {name: p.detach() for name, p in self.model.named_parameters()},  # tied weights once
            "optimizer": self.optimizer.state_dict(),
            "trainer": {"step": self.step, "tokens": self.tokens, "data": self.data.train.state_dict()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = dict(self.model.named_parameters())
        saved = state["model"]
        for name in sorted(parameters.keys() | saved.keys()):
            here, there = parameters.get(name), saved.get(name)
            if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
                raise UserError(f"the checkpoint is of another model: {name} is not the same there as here")
        self.optimizer.load_state_dict(state["optimizer"])  # refuses before it changes anything
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        self.data.train.load_state_dict(state["trainer"].get("data", {}))
        self.step = state["trainer"]["step"]
        self.tokens = state["trainer"]["tokens"]
