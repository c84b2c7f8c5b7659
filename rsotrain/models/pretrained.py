"""Weights of Hugging Face folders: safetensors and .bin files, single and sharded, in; safetensors out.

The parameter names of ``rsotrain.models.llama`` are those of transformers' classes, so tensors are copied by
name; a tied head is stored once.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rsotrain.config.schema import ModelConfig
from rsotrain.errors import UserError, require
from rsotrain.files import read_json
from rsotrain.models.fit import Described, first_difference
from rsotrain.models.huggingface_config import read_config, read_window
from rsotrain.models.llama import Llama
from rsotrain.models.lora_linear import is_factor
from rsotrain.parallel.sharding import local, shard_of

# In the order in which transformers looks for them; an index names the files of a sharded model.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TRUNK = ("embed_tokens.", "layers.", "norm.")  # how names begin in a folder of the model without its head
MAX_SHARD_BYTES = 5 * 10**9

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class HuggingFaceFolder:
    """``config``: ties the embeddings only where the weights do."""

    path: Path
    config: ModelConfig

    def dtype(self) -> torch.dtype:
        """That of the first tensor."""
        for _, _, read in self.tensors():
            return read().dtype  # while the file is open
        raise UserError(f"the weights in {self.path} are empty")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], Read]]:
        """(name in the model, shape, a function that reads the tensor), file by file.

        Tables that old versions stored are left out, and of a tied head the second copy. Raises UserError
        for a file that is missing or damaged.
        """
        tied = self.config.tie_word_embeddings
        twice = tied and {EMBEDDING, HEAD} <= {name for name, _, _ in _stored(self.path)}
        for name, shape, read in _stored(self.path):
            if name == HEAD and tied:
                if twice:
                    continue
                name = EMBEDDING
            yield name, shape, read


def _stored(folder: Path) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """As ``HuggingFaceFolder.tensors``, with all heads."""
    try:
        for file in _files(folder):
            for name, shape, read in _read_bin(file) if file.suffix == ".bin" else _read_safetensors(file):
                if not name.endswith("rotary_emb.inv_freq"):
                    yield f"model.{name}" if name.startswith(_TRUNK) else name, shape, read
    except UserError:
        raise
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the weights in {folder} cannot be read ({error})") from error


def _files(folder: Path) -> list[Path]:
    found = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"the weights in {folder} cannot be read (no {WEIGHTS[0]} and no {WEIGHTS[2]})")
    if found.suffix != ".json":
        return [found]
    names = sorted(set(read_json(found)["weight_map"].values()))
    for name in names:
        require(Path(name).name == name, f"{found} names {name[:80]!r}, which is no file beside it")
    return [folder / name for name in names]


def _read_safetensors(file: Path) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            shape = tuple(opened.get_slice(name).get_shape())
            yield name, shape, lambda name=name: opened.get_tensor(name)  # type: ignore[misc]


def _read_bin(file: Path) -> Iterator[tuple[str, tuple[int, ...], Read]]:
    """Of a pickle: nothing that is not a tensor is made, and nothing runs."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # as torch wrote it before version 1.6
            content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged pickle nearly any
        raise UserError(
            f"{file} cannot be read as a file of tensors, and what else it may be could run code; convert the"
            " folder with transformers: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
        ) from error
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{file} holds something else than tensors by name")
    for name, tensor in content.items():
        yield str(name), tuple(tensor.shape), lambda tensor=tensor: tensor  # type: ignore[misc]


def read_huggingface(folder: Path) -> HuggingFaceFolder:
    """A folder with config.json and weights. Raises UserError where they cannot be read."""
    config = read_config(folder)
    if config.tie_word_embeddings and not _shares_its_head(folder):
        config = replace(config, tie_word_embeddings=False)
    return HuggingFaceFolder(folder, config)


def ties_embeddings(folder: Path) -> bool:
    """Whether head and embedding are one; what config.json says where there are no weights."""
    if any((folder / name).is_file() for name in WEIGHTS):
        return read_huggingface(folder).config.tie_word_embeddings
    return read_config(folder).tie_word_embeddings


def _shares_its_head(folder: Path) -> bool:
    """As transformers decides: two that are both stored, and differ, stay two."""
    found: dict[str, Tensor] = {}
    for name, _, read in _stored(folder):
        if name in (EMBEDDING, HEAD):
            found[name] = read()
    if len(found) < 2:
        return True
    embedding, head = found[EMBEDDING], found[HEAD]
    if embedding.dtype != head.dtype:
        embedding, head = embedding.float(), head.float()
    return torch.equal(embedding, head)


def check_fit(model: nn.Module, folder: HuggingFaceFolder) -> None:
    """Raise UserError unless the folder's weights are those of ``model``, which may be without memory.

    Embedding and head may have more rows in the model, and its linears adapters.
    """
    here: dict[str, Described] = {
        name: (tuple(p.shape), None) for name, p in model.named_parameters() if not is_factor(name)
    }
    there = {}
    rows = folder.config.vocab_size
    for name, shape, _ in folder.tensors():
        if name in (EMBEDDING, HEAD) and shape[:1] == (rows,) and _is_longer(here.get(name), shape):
            shape = here[name][0]
        there[name] = (shape, None)
    config = model.config
    assert isinstance(config, ModelConfig)
    if config.tie_word_embeddings and not folder.config.tie_word_embeddings:
        raise UserError(
            f"{folder.path} has a head of its own, which model.tie_word_embeddings=true would drop;"
            " leave that out"
        )
    if difference := first_difference(here, there):
        raise UserError(
            f"{folder.path} holds another model: {difference}; use model=pretrained, or its sizes"
        )
    heads, theirs = config.num_attention_heads, folder.config.num_attention_heads
    if heads != theirs:  # the matrices are as large for any number
        raise UserError(
            f"{folder.path} has num_attention_heads={theirs}, and this model {heads}; use model=pretrained,"
            " and leave model.num_attention_heads out"
        )
    window, positions = read_window(folder.path), config.max_position_embeddings
    if window is not None and positions > window:
        raise UserError(
            f"attention in {folder.path} spans {window} tokens, which is full attention for so many positions"
            f" only; model.max_position_embeddings={positions} must be at most {window}"
        )


def _is_longer(described: Described | None, other: tuple[int, ...]) -> bool:
    if described is None:
        return False
    shape, _ = described
    return len(shape) == len(other) and shape[1:] == other[1:] and shape[0] > other[0]


@torch.no_grad()
def load_weights(model: Llama, folder: HuggingFaceFolder) -> None:
    """Copy a folder's tensors into the model's parameters, sharded or not, in the parameters' dtype.

    Rows of embedding and head that the folder lacks stay as they are. Raises UserError, before anything is
    changed, where names, shapes or what shapes do not show differ.
    """
    check_fit(model, folder)
    for name in ("rope_theta", "rope_scaling", "rms_norm_eps"):
        here, there = getattr(model.config, name), getattr(folder.config, name)
        if here != there:
            warnings.warn(f"{folder.path} has {name}={there}, and this model {here}", stacklevel=2)
    parameters = dict(model.named_parameters())
    for name, _, read in folder.tensors():
        _copy_rows(read(), parameters[name])


def _copy_rows(whole: Tensor, parameter: nn.Parameter) -> None:
    shard, piece = shard_of(parameter), local(parameter)
    if shard.dim == 0:
        own = whole[shard.start : shard.stop]
        piece[: len(own)].copy_(own)
    else:
        piece[: len(whole)].copy_(shard.of(whole))


def save_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors as ``transformers`` does, in several files where they are large."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(dict(tensors), folder, max_shard_size=MAX_SHARD_BYTES)
