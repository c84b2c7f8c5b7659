"""Weights of Hugging Face folders: single and sharded safetensors, in and out.

The parameter names of ``rsotrain.models.llama`` are those of LlamaForCausalLM, so tensors are copied by
name; a tied head is stored once.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rsotrain.config.schema import ModelConfig
from rsotrain.errors import UserError
from rsotrain.models.huggingface_config import read_config
from rsotrain.models.llama import Llama
from rsotrain.parallel.sharding import local, shard_of

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class HuggingFaceFolder:
    path: Path
    config: ModelConfig

    def _files(self) -> list[Path]:
        if (self.path / INDEX).is_file():
            names = json.loads((self.path / INDEX).read_text())["weight_map"].values()
            return [self.path / name for name in sorted(set(names))]
        return [self.path / WHOLE]

    def dtype(self) -> torch.dtype:
        """That of the first tensor."""
        for _, _, read in self.tensors():
            return read().dtype  # while the file is open
        raise UserError(f"the weights in {self.path} are empty")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        """(name, shape, a function that reads the tensor), file by file.

        Raises UserError for a file that is missing or damaged.
        """
        try:
            for file in self._files():
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                        shape = tuple(opened.get_slice(name).get_shape())
                        yield name, shape, lambda opened=opened, name=name: opened.get_tensor(name)  # type: ignore[misc]
        except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"the weights in {self.path} cannot be read ({error})") from error


def read_huggingface(folder: Path) -> HuggingFaceFolder:
    """A folder with config.json and safetensors. Raises UserError for an architecture that does not fit."""
    return HuggingFaceFolder(folder, read_config(folder))


def check_fit(model: nn.Module, tensors: Iterable[tuple[str, tuple[int, ...], object]], where: str) -> None:
    """Raise UserError for the first name or shape in which tensors and the model's parameters differ."""
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found = {name: shape for name, shape, _ in tensors if not _is_superfluous(name, parameters)}
    for name in sorted(parameters.keys() | found.keys()):
        here, there = parameters.get(name), found.get(name)
        if here is None:
            raise UserError(f"{where} has {name}, which this model lacks; use model=pretrained")
        if there is None:
            raise UserError(f"{where} has no {name}, which this model has; use model=pretrained")
        if here != there:
            raise UserError(
                f"{where}: {name} is {_by(there)} there and {_by(here)} in this model;"
                " use model=pretrained, or its sizes"
            )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _is_superfluous(name: str, parameters: Mapping[str, object]) -> bool:
    """A head that is stored although it is tied, and tables that old versions stored."""
    return (name == HEAD and HEAD not in parameters) or name.endswith("rotary_emb.inv_freq")


@torch.no_grad()
def load_weights(model: Llama, folder: HuggingFaceFolder) -> None:
    """Copy a folder's tensors into the model's parameters, sharded or not, in the parameters' dtype.

    Raises UserError, before anything is changed, where names, shapes or what shapes do not show differ.
    """
    check_fit(model, folder.tensors(), str(folder.path))
    here, there = model.config, folder.config
    if here.num_attention_heads != there.num_attention_heads:  # the matrices are as large for any number
        raise UserError(
            f"{folder.path} has num_attention_heads={there.num_attention_heads}, and this model"
            f" {here.num_attention_heads}; use model=pretrained, and leave model.num_attention_heads out"
        )
    if here.tie_word_embeddings and not there.tie_word_embeddings:
        raise UserError(
            f"{folder.path} has a head of its own, which model.tie_word_embeddings=true would drop;"
            " leave that out"
        )
    parameters = dict(model.named_parameters())
    for name, _, read in folder.tensors():
        if name in parameters:
            local(parameters[name]).copy_(shard_of(parameters[name]).of(read()))


def save_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors as ``transformers`` does, in several files where they are large."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), folder, max_shard_size=MAX_SHARD_BYTES)
