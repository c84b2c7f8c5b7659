"""Hugging Face folders in and out: the same tensors bit by bit, the same logits, a sentence otherwise."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.huggingface import CPU, VOCAB, tensors, trained, write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsotrain.config.data import EmbeddedDataConfig, ModelType, TrainedTokenizerConfig
from rsotrain.config.schema import Precision
from rsotrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from rsotrain.data.tokenizer_huggingface import load_tokenizer
from rsotrain.errors import UserError
from rsotrain.inference.export import export_huggingface
from rsotrain.models.build import build_model
from rsotrain.models.huggingface_config import read_config
from rsotrain.models.pretrained import load_weights, read_huggingface

SENTENCES = ["The whale swam under the ship, and 1851 of them saw it.\n", "Call me Ishmael; é 🙂  twice.\n\n"]


@pytest.fixture(scope="module")
def sentencepiece() -> bytes:
    return train_tokenizer(SENTENCES * 20, TrainedTokenizerConfig("trained", vocab_size=VOCAB))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "50KB"])
def test_import_and_export_give_the_same_tensors(
    tied: bool, dtype: torch.dtype, shard_size: str, sentencepiece: bytes, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "in", dtype, shard_size, tie_word_embeddings=tied)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "50KB")
    export_huggingface(trained(folder, sentencepiece), tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], tensor), name
    assert read_config(tmp_path / "out") == read_config(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_both_sides_give_the_same_logits(tied: bool, sentencepiece: bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", tie_word_embeddings=tied)
    ours = trained(folder, sentencepiece)
    export_huggingface(ours, tmp_path / "out")
    tokens = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours.model(tokens)
        for path in (folder, tmp_path / "out"):
            theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            # fp32 through two layers: the same sums in another order
            torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.01


@pytest.mark.parametrize("model_type", ModelType)
def test_the_exported_tokenizer_gives_the_same_ids(model_type: ModelType, tmp_path: Path) -> None:
    from rsotrain.data.sources import open_corpora

    train, validation = open_corpora(EmbeddedDataConfig("embedded"), tmp_path)
    texts = [next(train.documents(print)).text for _ in range(1)] * 2
    config = TrainedTokenizerConfig("trained", vocab_size=500, model_type=model_type)
    model = train_tokenizer(SENTENCES * 20 + texts, config)
    ours = SentencePieceTokenizer(model)
    folder = write_folder(tmp_path / "in", vocab_size=500)
    export_huggingface(trained(folder, model), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    samples = [document.text for document, _ in zip(validation.documents(print), range(20), strict=False)]
    for text in [*SENTENCES, *samples, "", "  two  spaces ", "日本語 \x00"]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode([text])[0].tolist()
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == ours.eos_id
    again = load_tokenizer(tmp_path / "out")
    assert again.eos_id == ours.eos_id
    assert again.encode(SENTENCES)[0].tolist() == ours.encode(SENTENCES)[0].tolist()
    assert ours.eos_id not in again.encode(["a</s>b"])[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 32}, r"lm_head.weight is 300x32 there and 300x64 in this model"),
        (
            {"num_hidden_layers": 3},
            r"there is model.layers.2.input_layernorm.weight \(64\), which this",
        ),
        (
            {"num_hidden_layers": 1},
            r"there is no model.layers.1.input_layernorm.weight, which this",
        ),
        ({"num_key_value_heads": 4}, r"k_proj.weight is 64x64 there and 32x64 in this model"),
        ({"tie_word_embeddings": True}, r"there is no lm_head.weight, which this model has \(300x64\)"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    right = read_huggingface(write_folder(tmp_path / "right"))
    model = build_model(right.config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=sentence):
        load_weights(model, read_huggingface(write_folder(tmp_path / "wrong", **changes)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_shapes_do_not_show_must_be_as_in_the_folder(tmp_path: Path) -> None:
    folder = read_huggingface(write_folder(tmp_path, num_key_value_heads=4))
    for changes in ({"num_attention_heads": 8, "num_key_value_heads": 8}, {"tie_word_embeddings": True}):
        config = dataclasses.replace(folder.config, **changes)
        model = build_model(config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
        with pytest.raises(UserError, match=r"num_attention_heads=4|a head of its own"):
            load_weights(model, folder)


def test_damaged_and_missing_weights_are_one_sentence(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a")
    source = read_huggingface(folder)
    model = build_model(source.config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"weights in .* cannot be read"):
        load_weights(model, source)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model.safetensors and no pytorch_model.bin"):
        load_weights(model, source)
    for index in (
        "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "b.safetensors"}}',
        '{"weight_map": {"a": []}}', "[" * 100_000,
    ):  # fmt: skip
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(UserError, match=r"cannot be read|is damaged: it is nested too deeply"):
            load_weights(model, source)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    with pytest.raises(UserError, match=r"names '\.\./b.safetensors', which is no file beside it"):
        load_weights(model, source)


def test_a_folder_without_a_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer(tmp_path)
