"""Exported folders of every variation: transformers' class gives our logits, or the export is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.huggingface import logits_of_transformers, tensors, trained, write_folder
from helpers.variations import CHANGES, TINY, VARIATIONS, batch, random_model

from rsotrain.config.data import TrainedTokenizerConfig
from rsotrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from rsotrain.data.tokenizer_huggingface import load_tokenizer
from rsotrain.errors import UserError
from rsotrain.inference.export import export_huggingface
from rsotrain.inference.trained_model import TrainedModel
from rsotrain.models.huggingface_config import family_of, read_config
from rsotrain.models.parts import PARTS

SENTENCE = "The whale swam under the ship, and 1851 of them saw it.\n"


@pytest.fixture(scope="module")
def sentencepiece() -> bytes:
    return train_tokenizer([SENTENCE] * 20, TrainedTokenizerConfig("trained", vocab_size=300))


def as_trained(config: Any, sentencepiece: bytes) -> TrainedModel:
    model = random_model(config)
    path = Path("nowhere")
    return TrainedModel(path, model, config, SentencePieceTokenizer(sentencepiece), torch.float32, 1)


@pytest.mark.parametrize("name", VARIATIONS)
def test_transformers_gives_the_logits_or_the_export_is_refused(
    name: str, sentencepiece: bytes, tmp_path: Path
) -> None:
    ours = as_trained(VARIATIONS[name], sentencepiece)
    tokens, _ = batch()
    if PARTS.keys() & CHANGES[name].keys():  # of which transformers' classes have the first only
        with pytest.raises(UserError, match="cannot be exported"):
            export_huggingface(ours, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    export_huggingface(ours, tmp_path / "out")
    with torch.no_grad():
        # fp32 through two layers of weights ten times the usual: the same sums in another order
        torch.testing.assert_close(
            ours.model(tokens), logits_of_transformers(tmp_path / "out", tokens), atol=1e-4, rtol=1e-5
        )
    assert tensors(tmp_path / "out").keys() == dict(ours.model.named_parameters()).keys()
    read = read_config(tmp_path / "out")
    heads = ours.config.num_key_value_heads
    assert dataclasses.replace(read, name="test", vocab_size=None, num_key_value_heads=heads) == ours.config
    again = load_tokenizer(tmp_path / "out")
    assert again.encode([SENTENCE])[0].tolist() == ours.tokenizer.encode([SENTENCE])[0].tolist()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_norm": True, "mlp_bias": True}, "model.mlp_bias=true and model.qk_norm=true"),
        ({"qk_norm": True, "qkv_bias": True}, "model.qkv_bias=true and model.qk_norm=true"),
        ({"qkv_bias": True, "mlp_bias": True}, "model.qkv_bias=true and model.mlp_bias=true"),
        (
            {"num_attention_heads": 6, "head_dim": 6, "attention_bias": True},
            "model.head_dim=6 and model.attention_bias=true",
        ),
        ({"mlp": "some_other"}, "model.mlp=some_other"),
    ],
)
def test_what_no_class_of_transformers_is_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=rf"a model with {named} cannot be exported") as caught:
        family_of(dataclasses.replace(TINY, **changes))
    assert "\n" not in str(caught.value)


def test_a_refused_export_leaves_an_older_one_alone(sentencepiece: bytes, tmp_path: Path) -> None:
    export_huggingface(as_trained(TINY, sentencepiece), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    refused = as_trained(dataclasses.replace(TINY, qk_norm=True, mlp_bias=True), sentencepiece)
    with pytest.raises(UserError, match="cannot be exported"):
        export_huggingface(refused, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"sliding_window": 40}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32, "attention_bias": True}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_was_read_is_written_again_with_the_same_tensors(
    family: str, changes: dict[str, Any], dtype: torch.dtype, sentencepiece: bytes, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "in", dtype, family=family, **changes)
    export_huggingface(trained(folder, sentencepiece), tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert read_config(tmp_path / "out") == read_config(folder)


def test_the_parts_of_transformers_classes_are_the_first_of_each_table() -> None:
    """An export knows no other part: its defaults are what transformers has."""
    for field, known in PARTS.items():
        assert next(iter(known)) == getattr(TINY, field)
