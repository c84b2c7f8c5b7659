"""Tasks of lm-eval, with one defined here: continuations whose likelier one is known."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.huggingface import trained, write_folder

from rsotrain.config.data import EvaluationConfig, TrainedTokenizerConfig
from rsotrain.data.tokenizer import train_tokenizer
from rsotrain.errors import UserError
from rsotrain.inference.downstream import evaluate_tasks
from rsotrain.inference.trained_model import TrainedModel
from rsotrain.parallel.ranks import World
from rsotrain.training.evaluation import evaluate

pytest.importorskip("lm_eval", reason="pip install 'rsotrain[eval]'")

TASK = """
task: whales
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""
CPU = torch.device("cpu")


@pytest.fixture
def ours(tmp_path: Path) -> TrainedModel:
    model = train_tokenizer(
        ["the whale swam, the ship sank"] * 9, TrainedTokenizerConfig("trained", vocab_size=280)
    )
    return trained(write_folder(tmp_path / "in", vocab_size=280), model)


def write_task(folder: Path, task: str, rows: list[dict[str, Any]]) -> EvaluationConfig:
    """The configuration that evaluates a task of these rows; ``task``: YAML without the path of its data."""
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks/task.yaml").write_text(task.format(path=data))
    name = task.split()[1]
    return EvaluationConfig(tasks=[name], tasks_path=str(folder / "tasks"))


def test_a_rolling_task_scores_texts_as_evaluation_does(ours: TrainedModel, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["the whale", " ship", " sank\n", "swam, ", " é", "9", "</s>", "<s>", "  "]
    texts = ["</s> first", *("".join(rng.choices(words, k=rng.randrange(1, 7))) for _ in range(30))]
    batches, num_targets = [], 0
    for ids in ours.tokenizer.encode(texts):
        assert 0 < len(ids) < ours.config.max_position_embeddings  # one window of lm-eval, too
        tokens = torch.tensor([[ours.tokenizer.eos_id, *ids]])
        batches.append((tokens[:, :-1], tokens[:, 1:]))
        num_targets += len(ids)
    bytes_per_token = sum(len(text.encode()) for text in texts) / num_targets
    expected = evaluate(ours.model, batches, World(CPU), bytes_per_token=bytes_per_token)
    config = write_task(tmp_path, ROLLING, [{"text": text} for text in texts])
    scores = evaluate_tasks(ours, config, CPU)
    # fp32, the same sums in another order
    assert scores["rolling/bits_per_byte"] == pytest.approx(expected["val/bits_per_byte"], rel=1e-5)
    assert scores["rolling/byte_perplexity"] == pytest.approx(2 ** expected["val/bits_per_byte"], rel=1e-5)


def test_a_local_task_scores_what_the_model_finds_likelier(ours: TrainedModel, tmp_path: Path) -> None:
    # Which of two continuations the model prefers is computed here, by its own loss.
    encode, eos = ours.tokenizer.encode, ours.tokenizer.eos_id
    questions = [("the", [" whale", " ship"]), ("the ship", [" sank", " swam"]), ("a", [" b", " the"])]
    rows = []
    for question, choices in questions:
        losses = []
        for choice in choices:
            context, whole = (ids.tolist() for ids in encode([question, question + choice]))
            tokens = torch.tensor([[eos, *whole]])
            targets = torch.full((1, len(whole)), -100)
            targets[0, len(context) :] = tokens[0, len(context) + 1 :]
            losses.append(float(ours.model(tokens[:, :-1], targets).detach()))
        assert abs(losses[0] - losses[1]) > 1e-3
        rows.append({"question": question, "choices": choices, "answer": losses.index(min(losses))})
    rows.append(rows[0] | {"answer": 1 - rows[0]["answer"]})  # the last is answered wrongly
    evaluation = write_task(tmp_path, TASK, rows)
    assert evaluate_tasks(ours, evaluation, CPU)["whales/acc"] == pytest.approx(0.75)
    evaluation.task_limit = 3
    assert evaluate_tasks(ours, evaluation, CPU)["whales/acc"] == pytest.approx(1.0)
    evaluation.tasks = ["sharks"]
    with pytest.raises(UserError, match="lm-eval knows no task sharks"):
        evaluate_tasks(ours, evaluation, CPU)
