"""Models to use rather than to train: from a run, one of its checkpoints, or a Hugging Face folder."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rsotrain.checkpoints.files import list_checkpoints, load_checkpoint
from rsotrain.config.choices import WeightRounding
from rsotrain.config.keys import from_plain
from rsotrain.config.schema import Config, ModelConfig, Precision
from rsotrain.data.tokenizer import TOKENIZER_FOLDER, Tokenizer
from rsotrain.data.tokenizer_huggingface import load_tokenizer
from rsotrain.errors import UserError
from rsotrain.files import read_yaml
from rsotrain.models.build import build_model
from rsotrain.models.fit import first_difference
from rsotrain.models.llama import Llama
from rsotrain.models.lora_linear import merged
from rsotrain.models.pretrained import EMBEDDING, read_huggingface
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
    config = dataclasses.replace(folder.config, init_from=str(path))
    model = build_model(
        config, vocab_size=folder.config.vocab_size, precision=precision, device=device, seed=0
    )
    return TrainedModel(path, model, folder.config, tokenizer, folder.dtype(), None)


def _from_run(run: Path, checkpoint: Path, device: torch.device, precision: Precision) -> TrainedModel:
    settings = _settings(run)
    config = _model_of(run, settings)
    tokenizer = load_tokenizer(run / TOKENIZER_FOLDER)
    try:
        tensors, _, record = load_checkpoint(checkpoint, torch.device("cpu"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{checkpoint} cannot be read ({error})") from error
    if (alpha := record.get("adapter_alpha")) is not None:
        tensors = merged(tensors, alpha)
    embedding = tensors.get(EMBEDDING)
    if embedding is None or embedding.ndim != 2:
        raise UserError(f"{checkpoint} holds no model: it has no {EMBEDDING} with a row for each token")
    mask = settings["data"].get("document_mask", False)
    build = partial(
        build_model,
        config,
        vocab_size=embedding.shape[0],
        precision=precision,
        seed=0,
        separator_id=tokenizer.eos_id if mask else None,
        float32_gains=settings["optimizer"].get("weight_rounding") == WeightRounding.stochastic.name,
    )
    _check(tensors, build(device=torch.device("meta")), checkpoint)
    model = build(device=device)
    _copy(tensors, model)
    return TrainedModel(checkpoint, model, config, tokenizer, embedding.dtype, record["step"])


def _settings(run: Path) -> dict[str, Any]:
    try:
        settings = read_yaml(run / CONFIG)
        return settings | {"model": dict(settings["model"]), "data": dict(settings["data"])}
    except UserError as error:
        raise UserError(f"{error}; so the model of {run} is not known") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run / CONFIG} describes no run, so the model of {run} is not known") from error


def _model_of(run: Path, settings: dict[str, Any]) -> ModelConfig:
    try:
        return dataclasses.replace(from_plain(ModelConfig, settings["model"]), init_from=None)
    except ValueError as error:
        raise UserError(f"the config.yaml of {run} describes no model: model.{error}") from error


def _check(tensors: dict[str, Tensor], model: Llama, checkpoint: Path) -> None:
    held = (dict(model.named_parameters()), tensors)
    here, there = ({name: (tuple(t.shape), None) for name, t in named.items()} for named in held)
    if difference := first_difference(here, there):
        raise UserError(
            f"{checkpoint} does not hold the model that its run's config.yaml describes: {difference}"
        )


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], model: Llama) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])
