"""Models to use rather than to train: from a run, one of its checkpoints, or a Hugging Face folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rsotrain.checkpoints.files import list_checkpoints, load_checkpoint
from rsotrain.config.schema import Config, ModelConfig, Precision
from rsotrain.data.tokenizer import TOKENIZER_FOLDER, Tokenizer
from rsotrain.data.tokenizer_huggingface import load_tokenizer
from rsotrain.errors import UserError
from rsotrain.files import read_yaml
from rsotrain.models.build import build_model
from rsotrain.models.llama import Llama
from rsotrain.models.pretrained import load_weights, read_huggingface
from rsotrain.tracking.run_files import CONFIG


@dataclass(frozen=True)
class TrainedModel:
    """``path``: what it was read from, the weights in ``dtype``. ``step``: None for a foreign one."""

    path: Path
    model: Llama
    config: ModelConfig
    tokenizer: Tokenizer
    dtype: torch.dtype
    step: int | None

    @property
    def vocab_size(self) -> int:
        return self.model.lm_head.weight.shape[0]


def open_trained(
    config: Config, run_folder: Path, device: torch.device, precision: Precision
) -> TrainedModel:
    """The model that ``config.checkpoint.path`` names, or the newest checkpoint in ``run_folder``.

    Raises UserError where there is none, or one that cannot be read.
    """
    path = Path(config.checkpoint.path).expanduser() if config.checkpoint.path is not None else run_folder
    if (path / "config.json").is_file():
        trained = _from_huggingface(path, device, precision)
    elif (path / "trainer.json").is_file():
        trained = _from_run(path.parent.parent, path, device, precision)
    else:
        checkpoints = list_checkpoints(path / "checkpoints")
        if not checkpoints:
            raise UserError(
                f"{path} is neither a run with a checkpoint, nor a checkpoint, nor a Hugging Face folder;"
                " give one with checkpoint.path=…"
            )
        trained = _from_run(path, checkpoints[-1], device, precision)
    if trained.vocab_size < trained.tokenizer.vocab_size:
        raise UserError(
            f"the tokenizer of {path} has {trained.tokenizer.vocab_size} ids, but its model only"
            f" {trained.vocab_size} rows; they do not belong together"
        )
    return trained


def _from_huggingface(path: Path, device: torch.device, precision: Precision) -> TrainedModel:
    folder = read_huggingface(path)
    tokenizer = load_tokenizer(path)
    assert folder.config.vocab_size is not None
    model = build_model(
        folder.config, vocab_size=folder.config.vocab_size, precision=precision, device=device, seed=0
    )
    load_weights(model, folder)
    return TrainedModel(path, model, folder.config, tokenizer, folder.dtype(), None)


def _from_run(run: Path, checkpoint: Path, device: torch.device, precision: Precision) -> TrainedModel:
    settings = _settings(run)
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {name: value for name, value in settings["model"].items() if name in names}
    config = ModelConfig(**values | {"init_from": None})
    tokenizer = load_tokenizer(run / TOKENIZER_FOLDER)
    try:
        tensors, _, record = load_checkpoint(checkpoint, torch.device("cpu"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{checkpoint} cannot be read ({error})") from error
    vocab_size = tensors["model.embed_tokens.weight"].shape[0]
    mask = settings["data"].get("document_mask", False)
    model = build_model(
        config,
        vocab_size=vocab_size,
        precision=precision,
        device=device,
        seed=0,
        separator_id=tokenizer.eos_id if mask else None,
    )
    _copy(tensors, model, checkpoint)
    dtype = tensors["model.embed_tokens.weight"].dtype
    return TrainedModel(checkpoint, model, config, tokenizer, dtype, record["step"])


def _settings(run: Path) -> dict[str, Any]:
    try:
        settings = read_yaml(run / CONFIG)
        return settings | {"model": dict(settings["model"]), "data": dict(settings["data"])}
    except UserError as error:
        raise UserError(f"{error}; so the model of {run} is not known") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run / CONFIG} describes no run, so the model of {run} is not known") from error


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], model: Llama, checkpoint: Path) -> None:
    parameters = dict(model.named_parameters())
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if shapes != {name: p.shape for name, p in parameters.items()}:
        raise UserError(f"{checkpoint} does not hold the model that its run's config.yaml describes")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
