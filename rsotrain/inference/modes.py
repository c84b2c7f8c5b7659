"""What can be done with a trained model: evaluate, generate, export."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from rsotrain.config.data import ExportDtype
from rsotrain.config.identity import run_folder_path
from rsotrain.config.rules_data import evaluated_data
from rsotrain.config.schema import Config, Precision
from rsotrain.data.build import build_validation
from rsotrain.errors import UserError
from rsotrain.files import finite, reason
from rsotrain.inference.export import export_huggingface
from rsotrain.inference.trained_model import TrainedModel, open_trained
from rsotrain.models.generation import generate_texts
from rsotrain.parallel.ranks import World, resolve_device
from rsotrain.tracking.display import print_result_table
from rsotrain.tracking.escaping import for_terminal, print_line
from rsotrain.training.evaluation import evaluate


def _open(config: Config, precision: Precision) -> tuple[TrainedModel, torch.device]:
    device = resolve_device(config.device)
    return open_trained(config, run_folder_path(config), device, precision), device


def evaluate_mode(config: Config, cache_dir: Path) -> dict[str, Any]:
    """Validation loss, perplexity and bits per byte on ``config.data``, and the scores of lm-eval's tasks.

    The result is printed, appended as one JSON object to ``evaluations.jsonl`` in the run's folder if it is
    a run's model, and returned. Raises UserError where model, data, tasks or lm-eval are missing.
    """
    trained, device = _open(config, config.precision)
    seq_len, longest = config.seq_len, trained.config.max_position_embeddings
    if seq_len > longest:
        raise UserError(
            f"seq_len={seq_len} is longer than the {longest} positions of {trained.path}; give at most these"
        )
    limit = config.evaluation.max_tokens
    validation = build_validation(
        evaluated_data(config.data),
        trained.tokenizer,
        seq_len=seq_len,
        cache_dir=cache_dir,
        notify=print_line,
        max_tokens=limit,
    )
    trained.model.model.separator_id = trained.tokenizer.eos_id if config.data.document_mask else None
    num_targets = validation.num_targets(limit)
    result: dict[str, Any] = {"model": str(trained.path), "data": config.data.name, "seq_len": seq_len}
    result |= evaluate(
        trained.model,
        validation.evaluation_batches(
            config.evaluation.micro_batch_size or config.micro_batch_size or config.batch_size, limit
        ),
        World(device),
        bytes_per_token=validation.num_target_bytes(trained.tokenizer.decode, limit) / num_targets,
        legacy_divisor=config.evaluation.legacy_divisor,
    )
    result["tokens"] = num_targets
    if config.evaluation.tasks:
        from rsotrain.inference.downstream import evaluate_tasks

        result |= evaluate_tasks(trained, config.evaluation, device)
    print_result_table(result)
    if trained.step is not None:
        _record(result, trained.path.parent.parent / "evaluations.jsonl")
    return result


def _record(result: dict[str, Any], path: Path) -> None:
    try:  # never through a link, which may lead out of the run
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(result)) + "\n")
    except OSError as error:  # somebody else's run, perhaps; the result is on the screen
        print_line(f"warning: {path} cannot be written ({reason(error)})")


def generate_mode(config: Config) -> dict[str, Any]:
    """Print and return what the model writes after each of ``generate.prompts``."""
    trained, device = _open(config, config.precision)
    samples = generate_texts(
        trained.model,
        trained.tokenizer,
        config.generate,
        max_context=trained.config.max_position_embeddings,
        device=device,
        seed=config.seed,
    )
    for prompt, text in samples:
        print(for_terminal(f"--- {prompt!r}\n{prompt}{text}", keep="\n\t"))
    return {"model": str(trained.path), "samples": [list(sample) for sample in samples]}


def export_mode(config: Config) -> dict[str, Any]:
    """Write the model as a Hugging Face folder: ``export.path``, or ``export`` in its run's folder.

    Raises UserError where that exists already and ``overwrite`` is not set, or cannot be written.
    """
    trained, _ = _open(config, Precision.fp32)
    if config.export.path is not None:
        folder = Path(config.export.path).expanduser()
    elif trained.step is not None:
        folder = trained.path.parent.parent / "export"
    else:
        raise UserError(f"{trained.path} is no run of ours; give the folder to write with export.path=…")
    if (folder / "config.json").exists() and not config.overwrite:
        raise UserError(f"{folder} holds a model already; overwrite=true replaces it")
    if (folder / "checkpoints").is_dir():  # its config.json would pass the run off as the exported model
        raise UserError(f"{folder} is a run; give another folder with export.path=…")
    dtype = config.export.dtype
    try:
        export_huggingface(trained, folder, None if dtype is None else DTYPES[dtype])
    except OSError as error:
        raise UserError(f"export.path={folder} cannot be written ({error.strerror or error})") from error
    print_line(f"{trained.path} is now a Hugging Face folder: {folder}")
    return {"model": str(trained.path), "path": str(folder)}


DTYPES = {ExportDtype.float32: torch.float32, ExportDtype.bfloat16: torch.bfloat16}
