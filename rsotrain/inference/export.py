"""A trained model as the folder that ``transformers`` loads: config.json, safetensors, tokenizer files."""

import json
from pathlib import Path

import torch

from rsotrain.data.tokenizer import SentencePieceTokenizer
from rsotrain.data.tokenizer_json import to_tokenizer_json
from rsotrain.inference.trained_model import TrainedModel
from rsotrain.models.huggingface_config import family_of, write_config
from rsotrain.models.pretrained import save_weights


def export_huggingface(trained: TrainedModel, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``trained`` into ``folder``, in ``dtype`` or that of its file.

    ``AutoModelForCausalLM`` gives the same logits. Texts begin with the separator here, so it is the bos
    token as well as the eos token there. Raises OSError where the folder cannot be written, and UserError,
    nothing written, for a model that no class of ``transformers`` is.
    """
    family_of(trained.config)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or trained.dtype
    tensors = {name: p.detach().cpu().to(dtype) for name, p in trained.model.named_parameters()}
    # gone first, written last: what is interrupted has none, and is not taken for a model
    (folder / "config.json").unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    save_weights(folder, tensors)
    for name, content in _tokenizer_files(trained).items():
        (folder / name).write_bytes(content)
    eos = trained.tokenizer.eos_id
    write_config(
        folder,
        trained.config,
        vocab_size=trained.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        eos_id=eos,
        bos_id=eos,
    )


def _tokenizer_files(trained: TrainedModel) -> dict[str, bytes]:
    tokenizer = trained.tokenizer
    files = dict(tokenizer.files)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return files
    described = to_tokenizer_json(tokenizer.model)
    eos = tokenizer.piece(tokenizer.eos_id)
    configuration = {
        "tokenizer_class": "LlamaTokenizer" if described is None else "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "model_max_length": trained.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    if described is not None:
        files["tokenizer.json"] = described.encode()
    files["tokenizer_config.json"] = (json.dumps(configuration, indent=2) + "\n").encode()
    return files
