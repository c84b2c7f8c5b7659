"""A document scored by ``transformers`` from an exported folder has the loss that evaluation gives here."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tokenizers_json
from helpers.huggingface import CPU, trained, write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rsotrain.config.data import FilesDataConfig, ModelType, Packing, TrainedTokenizerConfig
from rsotrain.data.build import build_validation
from rsotrain.data.tokenizer import train_tokenizer
from rsotrain.data.tokenizer_huggingface import load_tokenizer
from rsotrain.errors import UserError
from rsotrain.inference.export import export_huggingface
from rsotrain.inference.trained_model import TrainedModel
from rsotrain.parallel.ranks import World
from rsotrain.training.evaluation import evaluate

DOCUMENT = "  The ship saw 1851 whales;\nIshmael swam </s> under\tit, <s> and é too.\n"


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    config = TrainedTokenizerConfig("trained", vocab_size=300, model_type=ModelType.bpe)
    model = train_tokenizer(tokenizers_json.TEXTS, config)
    return trained(write_folder(tmp_path_factory.mktemp("model")), model)


def our_loss(ours: TrainedModel, folder: Path) -> float:
    (folder / "d").mkdir()
    (folder / "d/train.jsonl").write_text(json.dumps({"text": "something else"}))
    (folder / "d/validation.jsonl").write_text(json.dumps({"text": DOCUMENT}))
    data = FilesDataConfig(
        name="files",
        path=str(folder / "d/train.jsonl"),
        validation_path=str(folder / "d/validation.jsonl"),
        packing=Packing.padded,
    )
    sequences = build_validation(
        data, ours.tokenizer, seq_len=64, cache_dir=folder / "cache", notify=lambda _: None
    )
    result = evaluate(ours.model, sequences.evaluation_batches(4), World(CPU), bytes_per_token=1.0)
    return result["val/loss"]


def their_loss(folder: Path) -> float:
    """Of what the tokenizer makes of the text, and of the end of the document."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer(DOCUMENT).input_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def assert_agreeing(folder: Path, eos_id: int) -> None:
    """Everything that names a bos token, as read by transformers, names the separator."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generation = GenerationConfig.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == eos_id
    assert (config["bos_token_id"], config["eos_token_id"]) == (eos_id, eos_id)
    assert (generation.bos_token_id, generation.eos_token_id) == (eos_id, eos_id)
    assert tokenizer("a", "b").input_ids.count(eos_id) == 2


def test_a_sentencepiece_model_scores_alike(sentencepiece_model: TrainedModel, tmp_path: Path) -> None:
    export_huggingface(sentencepiece_model, tmp_path / "out")
    assert_agreeing(tmp_path / "out", sentencepiece_model.tokenizer.eos_id)
    # fp32, the same sums in another order
    assert their_loss(tmp_path / "out") == pytest.approx(our_loss(sentencepiece_model, tmp_path), rel=1e-5)


@pytest.mark.parametrize("kind", tokenizers_json.KINDS)
@pytest.mark.parametrize("processor", tokenizers_json.PROCESSORS)
def test_an_imported_tokenizer_scores_alike_whatever_it_put_before_a_text(
    kind: str, processor: str, sentencepiece_model: TrainedModel, tmp_path: Path
) -> None:
    source = tokenizers_json.write(tmp_path / "in", tokenizers_json.build(kind, processor))
    ours = dataclasses.replace(sentencepiece_model, tokenizer=load_tokenizer(source))
    export_huggingface(ours, tmp_path / "out")
    assert_agreeing(tmp_path / "out", ours.tokenizer.eos_id)
    assert their_loss(tmp_path / "out") == pytest.approx(our_loss(ours, tmp_path), rel=1e-5)
    again = load_tokenizer(tmp_path / "out")
    assert again.eos_id == ours.tokenizer.eos_id
    assert again.encode([DOCUMENT])[0].tolist() == ours.tokenizer.encode([DOCUMENT])[0].tolist()


def test_a_chat_template_keeps_its_special_tokens(sentencepiece_model: TrainedModel, tmp_path: Path) -> None:
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    source = tokenizers_json.write(tmp_path / "in", tokenizers_json.build("bpe"), chat_template=template)
    export_huggingface(
        dataclasses.replace(sentencepiece_model, tokenizer=load_tokenizer(source)), tmp_path / "out"
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids: Any = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], return_dict=False)
    assert (ids[0], ids[-1]) == (1, 2)


def test_a_refused_tokenizer_leaves_the_folder_as_it_was(
    sentencepiece_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsotrain.inference import export

    def refuse(*_: Any) -> None:
        raise UserError("no")

    monkeypatch.setattr(export, "huggingface_files", refuse)
    with pytest.raises(UserError, match="no"):
        export_huggingface(sentencepiece_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_that_transformers_does_not_decode_are_told(
    sentencepiece_model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rsotrain.data import tokenizer_export

    told: list[str] = []
    export_huggingface(sentencepiece_model, tmp_path / "a", notify=told.append)
    assert not told
    monkeypatch.setattr(tokenizer_export, "to_tokenizer_json", lambda _: None)
    monkeypatch.setattr(tokenizer_export, "PROBES", ("a",))
    monkeypatch.setattr(tokenizer_export, "RANDOM_PROBES", 0)
    export_huggingface(sentencepiece_model, tmp_path / "a", notify=told.append)
    assert "decode with the sentencepiece package" in told[0]
    assert not (tmp_path / "a/tokenizer.json").exists()
    assert math.isfinite(their_loss(tmp_path / "a"))
