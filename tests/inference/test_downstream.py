"""Tasks of lm-eval, with one defined here: continuations whose likelier one is known."""

import json
from pathlib import Path

import pytest
import torch
from helpers.huggingface import trained, write_folder

from rsotrain.config.data import EvaluationConfig, TrainedTokenizerConfig
from rsotrain.data.tokenizer import train_tokenizer
from rsotrain.errors import UserError
from rsotrain.inference.downstream import evaluate_tasks

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
CPU = torch.device("cpu")


def test_a_local_task_scores_what_the_model_finds_likelier(tmp_path: Path) -> None:
    model = train_tokenizer(
        ["the whale swam, the ship sank"] * 9, TrainedTokenizerConfig("trained", vocab_size=280)
    )
    ours = trained(write_folder(tmp_path / "in", vocab_size=280), model)
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
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/whales.yaml").write_text(TASK.format(path=data))
    evaluation = EvaluationConfig(tasks=["whales"], tasks_path=str(tmp_path / "tasks"))
    assert evaluate_tasks(ours, evaluation, CPU)["whales/acc"] == pytest.approx(0.75)
    evaluation.task_limit = 3
    assert evaluate_tasks(ours, evaluation, CPU)["whales/acc"] == pytest.approx(1.0)
    evaluation.tasks = ["sharks"]
    with pytest.raises(UserError, match="lm-eval knows no task sharks"):
        evaluate_tasks(ours, evaluation, CPU)
