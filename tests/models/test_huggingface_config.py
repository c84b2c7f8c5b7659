"""config.json in: which models are read, as transformers reads them, and one sentence for all else."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.huggingface import CPU, VOCAB, edit, logits_of_transformers, write_folder
from helpers.runs import compose

from rsotrain.config.model import FIELDS_OF_THE_RUN, RopeScalingConfig
from rsotrain.config.schema import Precision
from rsotrain.errors import UserError
from rsotrain.models.build import build_model
from rsotrain.models.huggingface_config import FAMILIES, family_of, read_config
from rsotrain.models.pretrained import load_weights, read_huggingface

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}  # fmt: skip
# Family, arguments of its configuration, fields of ours that are not the default.
READ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama with head_dim": ("Llama", {"head_dim": 24}, {"head_dim": 24}),
    "llama with biases": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama with linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 5e4}},
        {"rope_scaling": RopeScalingConfig("linear", 2.5)},
    ),
    "llama with llama3 rope": (
        "Llama",
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e4}},
        {"rope_scaling": RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 48)},
    ),
    "mistral": ("Mistral", {"sliding_window": None}, {}),
    "mistral with a window": ("Mistral", {"sliding_window": 40}, {"max_position_embeddings": 40}),
    "mistral whose heads do not divide": (
        "Mistral",
        {"sliding_window": 64, "num_attention_heads": 6, "head_dim": 10},
        {"num_attention_heads": 6, "head_dim": 10},
    ),
    "qwen2": ("Qwen2", {}, {"qkv_bias": True}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}, {"qkv_bias": True, "tie_word_embeddings": True}),
    "qwen2 with a window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        {"qkv_bias": True, "max_position_embeddings": 24},
    ),
    "qwen2 with a window in no layer": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2},
        {"qkv_bias": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}, {"qk_norm": True, "head_dim": 32}),
    "qwen3 with biases": (
        "Qwen3",
        {"head_dim": 16, "attention_bias": True, "rope_parameters": LLAMA3 | {"rope_theta": 5e4}},
        {
            "qk_norm": True,
            "attention_bias": True,
            "rope_scaling": RopeScalingConfig("llama3", 8.0, 1.0, 4.0, 48),
        },
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_folder_of_each_family_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    family, arguments, fields = READ[name]
    folder = read_huggingface(write_folder(tmp_path, family=family, wide=True, **arguments))
    plain = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 5e4, "name": "pretrained",
    }  # fmt: skip
    assert folder.config == dataclasses.replace(compose(["optimizer=adam"]).model, **plain | fields)
    model = build_model(folder.config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
    load_weights(model, folder)
    length = folder.config.max_position_embeddings
    tokens = torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(tokens)
    # fp32 through two layers of weights ten times the usual: the same sums in another order
    torch.testing.assert_close(ours, logits_of_transformers(tmp_path, tokens), atol=5e-4, rtol=1e-4)
    assert ours.std() > 1
    if name.startswith(("mistral", "qwen2 with a window")) and length < 64:  # beyond it, they would differ
        longer = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert (model(longer) - logits_of_transformers(tmp_path, longer)).abs().max() > 0.1
    assert family_of(folder.config).model_type == ("llama" if fields.keys() <= {
        "rope_scaling", "head_dim", "attention_bias", "mlp_bias", "max_position_embeddings"
    } else family.lower())  # fmt: skip


def test_a_model_with_a_window_takes_no_longer_sequences(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, family="Mistral", sliding_window=40)
    composed = compose(["model=pretrained", f"model.init_from={folder}", "optimizer=adam"])
    assert composed.model.max_position_embeddings == 40
    config = dataclasses.replace(read_config(folder), max_position_embeddings=41)
    model = build_model(config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
    with pytest.raises(
        UserError, match=r"spans 40 tokens, .* model\.max_position_embeddings=41 must be at most 40"
    ):
        load_weights(model, read_huggingface(folder))


def test_every_field_of_a_pretrained_model_is_the_folders_unless_it_is_given(tmp_path: Path) -> None:
    """All but those of the run; a field that is added to the model needs no second list."""
    folder = write_folder(
        tmp_path, family="Qwen3", head_dim=16, attention_bias=True, tie_word_embeddings=True,
        rope_parameters=LLAMA3 | {"rope_theta": 7e4}, initializer_range=0.3,
    )  # fmt: skip
    command = ["model=pretrained", f"model.init_from={folder}", "optimizer=adam"]
    model = compose(command).model
    read = read_config(folder)
    for field in dataclasses.fields(model):
        if field.name not in FIELDS_OF_THE_RUN:
            assert getattr(model, field.name) == getattr(read, field.name), field.name
    assert model.init_from == str(folder)
    assert model.initializer_range == 0.02
    changed = compose([*command, "model.rope_theta=1e6", "model.rope_scaling.factor=16"]).model
    assert changed.rope_theta == 1e6
    assert changed.rope_scaling == dataclasses.replace(read.rope_scaling, factor=16.0)


def test_rope_parameters_are_found_where_transformers_finds_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, wide=True)
    tokens = torch.randint(VOCAB, (1, 64), generator=torch.Generator().manual_seed(0))
    llama3 = {name: value for name, value in LLAMA3.items() if "original" not in name}
    for changes in (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
        {"rope_parameters": None, "rope_scaling": llama3},
        {"rope_parameters": None, "rope_scaling": llama3, "original_max_position_embeddings": 16},
        {"rope_parameters": None, "rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ):
        source = read_huggingface(edit(folder, **changes))
        model = build_model(source.config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
        load_weights(model, source)
        with torch.no_grad():
            expected = logits_of_transformers(folder, tokens)
            torch.testing.assert_close(model(tokens), expected, atol=5e-4, rtol=1e-4, msg=str(changes))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gpt2"}, "has model_type=gpt2, but only llama or mistral or qwen2 or qwen3"),
    ({"model_type": ["llama"]}, "has model_type="),
    ({"hidden_act": "gelu"}, "has hidden_act=gelu, but only silu"),
    ({"attention_bias": "yes"}, "has attention_bias=yes, but it must be true or false"),
    ({"tie_word_embeddings": 1}, "has tie_word_embeddings=1, but it must be true or false"),
    ({"head_dim": 7}, ": head_dim=7 must be even"),
    ({"head_dim": "x" * 5000}, "but it must be a positive number"),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
        "has rope_type=yarn, but only default or",
    ),
    ({"rope_scaling": {"rope_type": "linear"}}, "has factor=None, but it must be a positive number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "has factor=-2, but it must be"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}}, "low_freq_factor=9.0 must be less than"),
    ({"rope_parameters": {"rope_theta": "x"}}, "has rope_theta=x, but it must be"),
    ({"rope_parameters": ["default"]}, "has rope parameters that are not an object"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor=0.5, but only 1.0"),
    ({"sliding_window": "wide"}, "has sliding_window=wide, but it must be a positive number"),
    ({"quantization_config": {"bits": 4}}, "its weights are quantised"),
    ({"hidden_size": None}, "has hidden_size=None, but it must be a positive number"),
    ({"hidden_size": 63, "head_dim": None}, "does not split into"),
    ({"num_attention_heads": 0}, "has num_attention_heads=0, but it must be"),
    ({"num_attention_heads": True}, "has num_attention_heads=True, but it must be"),
    ({"num_key_value_heads": "two"}, "has num_key_value_heads=two, but it must be"),
    ({"num_key_value_heads": 3}, "is not divisible by"),
    ({"num_hidden_layers": 10**6}, ": num_hidden_layers=1000000 must be at most 10_000"),
    ({"hidden_size": 10**30}, "must be at most 1_000_000"),
    ({"rope_theta": 10**400, "rope_parameters": None}, "an integer of too many digits"),
    ({"rms_norm_eps": float("nan")}, "has rms_norm_eps=nan"),
    ({"rms_norm_eps": float("inf")}, "has rms_norm_eps=inf"),
    ({"hidden_size": {"a": [1] * 10_000}}, "but it must be a positive number"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED)
def test_what_cannot_be_read_is_one_short_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    folder = edit(write_folder(tmp_path), **changes)
    with pytest.raises(UserError) as caught:
        read_config(folder)
    told = str(caught.value)
    assert sentence in told
    assert str(folder / "config.json") in told
    assert "\n" not in told
    assert len(told) < 400


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged: Expecting value"),
        (b"[]", "is not a JSON object"),
        (b"{" * 3, "is damaged: Expecting property name"),
        (b"[" * 200_000, "is damaged: it is nested too deeply"),
        (b"\xff\xfe{}\x00", "is damaged: it is not UTF-8"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is damaged: Exceeds the limit"),
    ],
)
def test_a_damaged_file_is_one_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_file_a_pipe_and_a_huge_one_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="it is no regular file"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**40)  # a hole: no disk is taken
    with pytest.raises(UserError, match="it has more than 64 MiB"):
        read_config(tmp_path)


def test_keys_that_are_absent_stand_for_what_transformers_takes_them_for() -> None:
    transformers = pytest.importorskip("transformers")
    for family in FAMILIES:
        defaults = getattr(transformers, family.architecture.replace("ForCausalLM", "Config"))
        for name, value in family.absent.items():
            assert getattr(defaults, name) == value, (family, name)
        own = {field.name for field in dataclasses.fields(defaults)}
        assert {"attention_bias", "mlp_bias"} & own == {"attention_bias", "mlp_bias"} & set(family.told)


def test_null_key_value_heads_are_as_many_as_heads(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    assert read_config(edit(folder, num_key_value_heads=None)).num_key_value_heads == 4
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values["num_key_value_heads"]
    file.write_text(json.dumps(values))
    assert read_config(folder).num_key_value_heads == 4
    file.write_text(json.dumps(values | {"model_type": "mistral", "num_attention_heads": 8, "head_dim": 8}))
    assert read_config(folder).num_key_value_heads == 8  # not from the heads: MistralConfig says 8
