"""A trained model as the folder that ``transformers`` loads: config.json, safetensors, tokenizer files."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from rsotrain.data.tokenizer_export import decodes_bytes_elsewhere, huggingface_files
from rsotrain.data.tokenizer_huggingface import MAIN_FILE, OTHER_FILES, SENTENCEPIECE_FILES
from rsotrain.inference.trained_model import TrainedModel
from rsotrain.models.huggingface_config import family_of, write_config
from rsotrain.models.pretrained import save_weights


def export_huggingface(
    trained: TrainedModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    notify: Callable[[str], None] = print,
) -> None:
    """Write ``trained`` into ``folder``, in ``dtype`` or that of its file.

    ``AutoModelForCausalLM`` gives the same logits, ``AutoTokenizer`` the same ids. Texts begin with the
    separator here, so it is the bos token as well as the eos token there. Raises OSError where the folder
    cannot be written, and UserError, nothing written, for a model that no class of ``transformers`` is, or a
    tokenizer that it cannot run.
    """
    family_of(trained.config)
    tokenizer_files = huggingface_files(trained.tokenizer, trained.config.max_position_embeddings)
    if not decodes_bytes_elsewhere(tokenizer_files):
        notify(
            "warning: transformers encodes texts with this tokenizer as they are here, but shows bytes as"
            " <0x0A> when it decodes; decode with the sentencepiece package and tokenizer.model"
        )
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or trained.dtype
    tensors = {name: p.detach().cpu().to(dtype) for name, p in trained.model.named_parameters()}
    # gone first, written last: what is interrupted has none, and is not taken for a model
    (folder / "config.json").unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    save_weights(folder, tensors)
    for name in (MAIN_FILE, *SENTENCEPIECE_FILES, *OTHER_FILES):
        (folder / name).unlink(missing_ok=True)  # what another tokenizer may have left
    for name, content in tokenizer_files.items():
        (folder / name).write_bytes(content)
    eos = trained.tokenizer.eos_id
    generation = {"bos_token_id": eos, "eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_config(
        folder,
        trained.config,
        vocab_size=trained.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        eos_id=eos,
        bos_id=eos,
    )
