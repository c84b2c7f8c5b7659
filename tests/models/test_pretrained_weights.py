"""Where the weights of a folder lie and how they are named: read as transformers reads them."""

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ranks
from helpers.huggingface import CPU, VOCAB, edit, logits_of_transformers, tensors, write_folder
from helpers.runs import compose
from safetensors.torch import save_file

from rsotrain.config.schema import ModelConfig, Precision, Strategy
from rsotrain.errors import UserError
from rsotrain.models.build import build_model, materialize, model_vocab_size
from rsotrain.models.llama import Llama
from rsotrain.models.pretrained import EMBEDDING, HEAD, load_weights, read_huggingface
from rsotrain.parallel.ranks import World
from rsotrain.parallel.sharding import local, shard_model, shard_of

TOKENS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def imported(folder: Path) -> Llama:
    source = read_huggingface(folder)
    model = build_model(source.config, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
    load_weights(model, source)
    return model


def assert_reads_as_transformers(folder: Path) -> None:
    with torch.no_grad():
        ours = imported(folder)(TOKENS)
    # fp32 through two layers of weights ten times the usual: the same sums in another order
    torch.testing.assert_close(ours, logits_of_transformers(folder, TOKENS), atol=5e-4, rtol=1e-4)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    changed = {name: tensor.contiguous() for name, tensor in change(tensors(folder)).items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


def to_bin(folder: Path, *, shards: int = 1, **options: Any) -> Path:
    """The same folder as older versions of transformers wrote it."""
    named = list(tensors(folder).items())
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(dict(named), folder / "pytorch_model.bin", **options)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(dict(named[i::shards]), folder / file)
        weight_map |= {name: file for name, _ in named[i::shards]}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, {"shards": 3}, {"_use_new_zipfile_serialization": False}],
    ids=["zip", "sharded", "legacy"],
)
def test_bin_files_are_read(options: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, wide=True)
    expected = tensors(folder)
    model = imported(to_bin(folder, **options))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
    assert_reads_as_transformers(folder)


def test_a_bin_file_that_could_run_code_is_not_read(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    folder = to_bin(write_folder(tmp_path))
    for content in (pickle.dumps({"a": Hostile()}), b"", b"PK\x03\x04 cut off", b"text"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(
            UserError, match=r"cannot be read as a file of tensors.*save_pretrained"
        ) as caught:
            imported(folder)
        assert "\n" not in str(caught.value)
    torch.save({"a": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        imported(folder)
    for other in ([1, 2], {"a": 1}, torch.ones(2)):
        torch.save(other, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="holds something else than tensors by name"):
            imported(folder)
    assert not (tmp_path / "executed").exists()


def test_a_stale_index_beside_the_whole_file_is_passed_over(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, wide=True)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    assert_reads_as_transformers(folder)
    torch.save({}, folder / "pytorch_model.bin")  # nor is an older copy read
    assert_reads_as_transformers(folder)


def test_names_of_the_model_without_its_head_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, wide=True, tie_word_embeddings=True)
    rewrite(folder, lambda named: {name.removeprefix("model."): t for name, t in named.items()})
    assert "layers.0.mlp.up_proj.weight" in tensors(folder)
    assert_reads_as_transformers(folder)
    with pytest.raises(UserError, match=r"there is no lm_head\.weight, which this model has"):
        imported(edit(folder, tie_word_embeddings=False))  # transformers makes up a random one


def test_tables_that_old_versions_stored_are_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, wide=True)
    rewrite(folder, lambda named: named | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert_reads_as_transformers(folder)


@pytest.mark.parametrize("stored", ["equal", "equal in another dtype", "different", "head only"])
def test_embeddings_that_the_configuration_ties_are_tied_as_transformers_does(
    stored: str, tmp_path: Path
) -> None:
    """Two that are both stored, and differ, stay two; one that is stored alone is both."""
    folder = write_folder(tmp_path, wide=True)
    other = tensors(folder)[HEAD]

    def change(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = named[EMBEDDING].bfloat16().float() if "dtype" in stored else named[EMBEDDING]
        trunk = {name: t for name, t in named.items() if name not in (EMBEDDING, HEAD)}
        if stored == "head only":
            return trunk | {HEAD: other}
        head = embedding.bfloat16() if "dtype" in stored else embedding.clone()
        return trunk | {EMBEDDING: embedding, HEAD: other if stored == "different" else head}

    edit(rewrite(folder, change), tie_word_embeddings=True)
    source = read_huggingface(folder)
    assert source.config.tie_word_embeddings == (stored != "different")
    assert_reads_as_transformers(folder)
    composed = compose(["model=pretrained", f"model.init_from={folder}", "optimizer=adam"]).model
    assert composed.tie_word_embeddings == (stored != "different")
    model = build_model(composed, vocab_size=VOCAB, precision=Precision.fp32, device=CPU, seed=0)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), imported(folder)(TOKENS))


def test_what_does_not_fit_is_refused_before_there_is_memory_or_data(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    command = [
        "model=pretrained",
        f"model.init_from={folder}",
        "optimizer=adam",
        "model.intermediate_size=100",
    ]
    config = compose(command).model
    for device in ("meta", "cpu"):
        with pytest.raises(UserError, match=r"down_proj\.weight is 64x96 there and 64x100 in this model"):
            build_model(
                config, vocab_size=VOCAB, precision=Precision.fp32, device=torch.device(device), seed=0
            )


# --- more tokens than rows ----------------------------------------------------------------------------


def grown(folder: Path) -> ModelConfig:
    """Of a model with rows for seven tokens that the folder lacks."""
    command = ["model=pretrained", f"model.init_from={folder}", "optimizer=adam", "model.vocab_size=null"]
    return compose(command).model


@pytest.mark.parametrize("tied", [False, True])
def test_a_tokenizer_with_more_ids_gets_untrained_rows(tied: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, wide=True, tie_word_embeddings=tied)
    fixed = compose(["model=pretrained", f"model.init_from={folder}", "optimizer=adam"]).model
    with pytest.raises(UserError, match=r"307 pieces; model.vocab_size=null adds untrained rows"):
        model_vocab_size(fixed, VOCAB + 7)
    config = grown(folder)
    assert model_vocab_size(config, VOCAB + 7) == VOCAB + 7
    model = build_model(config, vocab_size=VOCAB + 7, precision=Precision.fp32, device=CPU, seed=0)
    for name, stored in tensors(folder).items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter[: len(stored)], stored), name
        # as initialised: 7 x 64 normals, whose deviation scatters by 1/√896
        if len(parameter) != len(stored):
            assert parameter[VOCAB:].std().item() == pytest.approx(0.02, rel=0.2)
    with torch.no_grad():
        logits = model(TOKENS)[..., :VOCAB]
    torch.testing.assert_close(logits, logits_of_transformers(folder, TOKENS), atol=5e-4, rtol=1e-4)


def test_fewer_rows_and_a_configuration_of_more_rows_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    with pytest.raises(UserError, match="300x64 there and 299x64 in this model"):
        build_model(grown(folder), vocab_size=VOCAB - 1, precision=Precision.fp32, device=CPU, seed=0)
    source = read_huggingface(edit(folder, vocab_size=VOCAB + 7))  # which is damaged
    model = build_model(source.config, vocab_size=VOCAB + 7, precision=Precision.fp32, device=CPU, seed=0)
    with pytest.raises(UserError, match="300x64 there and 307x64 in this model"):
        load_weights(model, source)


def sharded_rows(config: ModelConfig, world: World) -> dict[str, tuple[torch.Tensor, int | None]]:
    meta = torch.device("meta")
    model = build_model(config, vocab_size=VOCAB + 7, precision=Precision.fp32, device=meta, seed=0)
    assert world.mesh is not None
    shard_model(model, list(model.model.layers), world.mesh, Precision.fp32)
    materialize(model, world.device, 0)
    return {name: (shard_of(p).all_gather(local(p)), shard_of(p).dim) for name, p in model.named_parameters()}


@pytest.mark.slow
def test_ranks_have_the_rows_that_one_process_has(tmp_path: Path) -> None:
    """307 rows on three ranks: the last piece holds trained and untrained ones."""
    config = grown(write_folder(tmp_path / "in", family="Qwen3", head_dim=16, attention_bias=True))
    alone = build_model(config, vocab_size=VOCAB + 7, precision=Precision.fp32, device=CPU, seed=0)
    found = ranks.run(3, {"rows": partial(sharded_rows, config)}, tmp_path / "ranks", Strategy.fsdp)["rows"]
    for outcome in ranks.succeeded(found):
        for name, parameter in alone.named_parameters():
            assert torch.equal(outcome[name][0], parameter), name
        assert outcome[EMBEDDING][1] == 0
