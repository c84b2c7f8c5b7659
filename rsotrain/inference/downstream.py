"""Downstream tasks through lm-eval, on the model as ``transformers`` runs it."""

import tempfile
from pathlib import Path

import torch

from rsotrain.config.data import EvaluationConfig
from rsotrain.errors import UserError
from rsotrain.inference.export import export_huggingface
from rsotrain.inference.trained_model import TrainedModel


def evaluate_tasks(trained: TrainedModel, config: EvaluationConfig, device: torch.device) -> dict[str, float]:
    """``<task>/<metric>`` -> value. Raises UserError where lm-eval or a task is missing."""
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from rsotrain.inference.lm_eval_model import SeparatorFirst
    except ImportError as error:
        raise UserError(
            "evaluation.tasks needs lm-eval, which is not installed: pip install 'rsotrain[eval]'"
        ) from error
    manager = TaskManager(include_path=config.tasks_path)
    if unknown := [task for task in config.tasks if task not in manager.all_tasks]:
        raise UserError(
            f"lm-eval knows no task {unknown[0]}; evaluation.tasks_path=… names the folder of your own"
        )
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(trained, Path(folder))
        scores = lm_eval.simple_evaluate(
            model=SeparatorFirst(
                pretrained=folder,
                dtype=str(trained.dtype).removeprefix("torch."),
                add_bos_token=True,
                max_length=trained.config.max_position_embeddings,
                batch_size=config.micro_batch_size or 8,
                device=str(device),
            ),
            tasks=list(config.tasks),
            num_fewshot=config.num_fewshot,
            limit=config.task_limit,
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=False,
        )
    assert scores is not None  # only other ranks get None
    return {
        f"{task}/{metric.split(',')[0]}": float(value)
        for task, metrics in scores["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "stderr" not in metric
    }
