"""Random LLaMAs, and models of the other families, in Hugging Face folders."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from rsotrain.config.schema import Precision
from rsotrain.data.tokenizer import SentencePieceTokenizer
from rsotrain.inference.trained_model import TrainedModel
from rsotrain.models.build import build_model
from rsotrain.models.pretrained import load_weights, read_huggingface

VOCAB = 300


CPU = torch.device("cpu")


def write_folder(
    path: Path,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "5GB",
    family: str = "Llama",
    wide: bool = False,
    **changes: Any,
) -> Path:
    """A random model as ``transformers`` saves it: grouped queries, and what ``changes`` say.

    ``wide``: with weights ten times the usual, so that attention is not uniform.
    """
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 5e4, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # else the gains are all one, and a swap would not show
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        elif wide:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(path, max_shard_size=shard_size)
    return path


def edit(folder: Path, **changes: Any) -> Path:
    """Change the values of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def logits_of_transformers(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def trained(folder: Path, sentencepiece: bytes, precision: Precision = Precision.fp32) -> TrainedModel:
    source = read_huggingface(folder)
    assert source.config.vocab_size is not None
    model = build_model(
        source.config, vocab_size=source.config.vocab_size, precision=precision, device=CPU, seed=1
    )
    load_weights(model, source)
    tokenizer = SentencePieceTokenizer(sentencepiece)
    return TrainedModel(folder, model, source.config, tokenizer, source.dtype(), None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
