"""From the configuration to an initialised model, by way of the meta device."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rsotrain.config.rules import validate_model
from rsotrain.config.schema import ActivationCheckpointing, ModelConfig, Precision
from rsotrain.errors import UserError
from rsotrain.models.architecture import FACTORS, Kind, count_elements, weights_of
from rsotrain.models.llama import Llama
from rsotrain.models.pretrained import check_fit, load_weights, read_huggingface
from rsotrain.parallel.sharding import local, shard_of

PARAMETER_DTYPE = {
    Precision.bf16_mixed: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp32: torch.float32,
}
COMPUTE_DTYPE = {
    Precision.bf16_mixed: torch.bfloat16,
    Precision.bf16: torch.bfloat16,
    Precision.fp32: torch.float32,
}


def build_model(
    config: ModelConfig,
    *,
    vocab_size: int,
    precision: Precision,
    device: torch.device,
    seed: int,
    activation_checkpointing: ActivationCheckpointing = ActivationCheckpointing.none,
    separator_id: int | None = None,
    z_loss: float = 0.0,
    float32_gains: bool = False,
) -> Llama:
    """The model on ``device``, initialised; on the meta device it has shapes and dtypes only.

    ``separator_id``: the token that begins a document; attention then ends at its document's beginning.
    ``z_loss``: as in ``linear_cross_entropy``. ``float32_gains``: the gains of norms are float32 in every
    precision. Raises UserError where the sizes do not fit together, where
    ``config.init_from`` does not fit them, and for a pattern of ``config.freeze`` without a parameter.
    """
    validate_model(config)
    if vocab_size < 1:
        raise UserError(f"the vocabulary size is {vocab_size}, but must be at least 1")
    with torch.device("meta"):
        model = Llama(
            config,
            vocab_size=vocab_size,
            compute_dtype=COMPUTE_DTYPE[precision],
            activation_checkpointing=activation_checkpointing,
            separator_id=separator_id,
            z_loss=z_loss,
        ).to(PARAMETER_DTYPE[precision])
        if float32_gains:
            _widen_gains(model)
        model.tie_weights()
    freeze(model, config.freeze)
    if config.init_from is not None and config.vocab_size == vocab_size:  # known already: before any work
        check_fit(model, read_huggingface(Path(config.init_from).expanduser()))
    if device.type != "meta":
        materialize(model, device, seed)
    return model


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Train no parameter whose name one of ``patterns`` finds, regular expressions as in block_parameters.

    A tied weight goes by its first name. Raises UserError for a pattern that finds none, and where nothing is
    left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        try:
            found = [name for name in named if re.search(pattern, name)]
        except re.error as error:
            raise UserError(
                f"model.freeze holds {pattern!r}, which is no regular expression ({error})"
            ) from error
        if not found:
            raise UserError(
                f"model.freeze: {pattern!r} matches no parameter (names look like {next(iter(named))!r}, and"
                " a tied one goes by its first name); remove or correct it"
            )
        for name in found:
            named[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(f"model.freeze={list(patterns)} leaves nothing to train; narrow the patterns")


def _widen_gains(model: Llama) -> None:
    for module in model.modules():
        for name, kind in getattr(module, "kinds", {}).items():
            if kind is Kind.gain:
                own = getattr(module, name)
                own.data = own.data.to(torch.float32)


def model_vocab_size(config: ModelConfig, tokenizer_size: int) -> int:
    """Rows of the embedding: as configured, else the tokenizer's, rounded up where that is asked for.

    Raises UserError when the tokenizer has ids beyond them.
    """
    multiple = config.pad_vocab_to_multiple_of or 1
    size = config.vocab_size or -(-tokenizer_size // multiple) * multiple
    if size < tokenizer_size:
        pretrained = config.init_from is not None
        advice = "model.vocab_size=null adds untrained rows for the others" if pretrained else "leave it null"
        raise UserError(
            f"model.vocab_size={size} is smaller than the tokenizer's {tokenizer_size} pieces; {advice}"
        )
    return size


def materialize(model: Llama, device: torch.device, seed: int) -> None:
    """Give a model on the meta device, sharded or not, memory on ``device`` and its initial weights."""
    folder = None
    if model.config.init_from is not None:
        folder = read_huggingface(Path(model.config.init_from).expanduser())
        check_fit(model, folder)  # before there is memory for what it may not be
    if any(shard_of(parameter).mesh is not None for parameter in model.parameters()):
        model.to_empty(device=device)
    else:
        _allocate(model, device)
    model.tie_weights()
    initialize(model, seed)
    if folder is not None:
        load_weights(model, folder)


def _allocate(model: Llama, device: torch.device) -> None:
    """``model.to_empty`` for whole parameters, which would import sympy: half a second and 30 MiB."""
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.empty(old.shape, dtype=old.dtype, device=device)
            setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


@torch.no_grad()
def initialize(model: Llama, seed: int) -> None:
    """Gains 1, biases 0, every other weight normal with standard deviation ``initializer_range``.

    Adapters get their values from the method that adds them.

    Each parameter has its own generator, seeded from (seed, name), and is drawn in fp32 on the CPU, of
    which a rank keeps its piece: its values depend neither on the order of construction, nor on the
    precision, the device or the number of ranks, and one weight at a time is whole.
    """
    parameters = dict(model.named_parameters())
    for weight in weights_of(model):
        parameter = parameters[weight.name]
        if weight.kind is Kind.gain:
            nn.init.ones_(local(parameter))
        elif weight.kind is Kind.bias:
            nn.init.zeros_(local(parameter))
        elif weight.kind not in FACTORS:
            values = torch.empty(parameter.shape, dtype=torch.float32)
            random = initial_generator(weight.name, seed)
            values.normal_(0.0, model.config.initializer_range, generator=random)
            local(parameter).copy_(shard_of(parameter).of(values))


def initial_generator(name: str, seed: int) -> torch.Generator:
    """For the initial values of the parameter ``name``, on the CPU."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def model_without_memory(config: ModelConfig, vocab_size: int) -> Llama:
    """The model on the meta device, in fp32: to ask what it consists of. UserError as for ``build_model``."""
    return build_model(
        config, vocab_size=vocab_size, precision=Precision.fp32, device=torch.device("meta"), seed=0
    )


def count_parameters(config: ModelConfig, vocab_size: int) -> int:
    """Number of parameters; a tied head is counted once."""
    return count_elements(model_without_memory(config, vocab_size))
