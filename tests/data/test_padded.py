"""Padded sequences and document masks: against list-based references; tokenizers of other houses."""

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rsotrain.config.data import (
    FilesDataConfig,
    HubTokenizerConfig,
    InstructionsDataConfig,
    Packing,
    SyntheticDataConfig,
    TrainedTokenizerConfig,
)
from rsotrain.config.schema import ModelConfig, Precision
from rsotrain.data.build import Data, build_data
from rsotrain.data.build_tokenizer import build_tokenizer
from rsotrain.data.sequences import PaddedSequences
from rsotrain.data.sources import open_corpora
from rsotrain.data.targets import IGNORE_INDEX
from rsotrain.data.tokenizer import train_tokenizer
from rsotrain.errors import UserError
from rsotrain.models.build import build_model
from rsotrain.models.documents import document_mask

L = 24
EOS = 2


def build(path: Path, cache_dir: Path, seq_len: int = L) -> Data:
    return build_data(
        FilesDataConfig("files", path=str(path), validation_path=str(path), packing=Packing.padded),
        TrainedTokenizerConfig("trained", vocab_size=280),
        seq_len=seq_len, cache_dir=cache_dir, notify=lambda _: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 60 words: shorter than a sequence, and longer."""
    path = tmp_path_factory.mktemp("padded") / "a.jsonl"
    texts = [" ".join(["whale", "ship", "é"][i % 3] for i in range(n)) for n in range(1, 61)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def naive(data: Data, path: Path) -> list[tuple[list[int], list[int]]]:
    rows = []
    for line in path.read_text().splitlines():
        ids = [EOS, *data.tokenizer.encode([json.loads(line)["text"]])[0].tolist(), EOS][: L + 1]
        inputs, targets = ids[:-1], ids[1:]
        rows.append((inputs + [0] * (L - len(inputs)), targets + [IGNORE_INDEX] * (L - len(targets))))
    return rows


def test_padded_sequences_equal_a_naive_cut(documents: Path, cache_dir: Path) -> None:
    data = build(documents, cache_dir)
    assert isinstance(data.train, PaddedSequences)
    inputs, targets = data.train.batch(np.arange(60))
    rows = list(zip(inputs.tolist(), targets.tolist(), strict=True))
    assert rows == naive(data, documents)
    assert any(IGNORE_INDEX in t for _, t in rows)
    assert any(IGNORE_INDEX not in t for _, t in rows)
    picked = data.train.batch(np.array([59, 0, 59]))
    assert picked[1].tolist() == [rows[59][1], rows[0][1], rows[59][1]]


@pytest.mark.parametrize("max_tokens", [None, 1, 50, 333])
def test_evaluation_counts_no_padding_and_stops_at_the_limit(
    max_tokens: int | None, documents: Path, cache_dir: Path
) -> None:
    data = build(documents, cache_dir)
    wanted = [t for _, targets in naive(data, documents) for t in targets if t != IGNORE_INDEX][:max_tokens]
    for size in (1, 7, 100):
        batches = list(data.validation.evaluation_batches(size, max_tokens))
        targets = torch.cat([t for _, t in batches])
        assert targets[targets != IGNORE_INDEX].tolist() == wanted
    assert data.validation.num_targets(max_tokens) == len(wanted)
    counts = data.validation.target_counts(max_tokens)
    assert counts.tolist() == np.bincount(wanted, minlength=280).tolist()
    num_bytes = data.validation.num_target_bytes(data.tokenizer.decode, max_tokens)
    # a cut can fall inside a character of two bytes, which then counts as the three of its replacement
    assert abs(num_bytes - len(data.tokenizer.decode(wanted).encode())) <= 4 * 60


def test_prompts_are_inputs_and_no_targets(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"q": "ab " * n, "a": "whale"} for n in (1, 3, 40, 2)]  # the third fills the sequence
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told: list[str] = []
    data = build_data(
        InstructionsDataConfig(
            "instructions", path=str(path), validation_path=str(path), packing=Packing.padded,
            prompt_template="{q}?", response_field="a",
        ),
        TrainedTokenizerConfig("trained", vocab_size=268), seq_len=L, cache_dir=cache_dir, notify=told.append,
    )  # fmt: skip
    assert any("1 prompts fill seq_len=24; left out" in line for line in told)
    inputs, targets = data.train.batch(np.arange(3))
    encode = data.tokenizer.encode
    for row, n in enumerate((1, 3, 2)):
        prompt, answer = (ids.tolist() for ids in encode(["ab " * n + "?", "whale"]))
        expected = [IGNORE_INDEX] * len(prompt) + [*answer, EOS]
        assert targets[row].tolist() == (expected + [IGNORE_INDEX] * L)[:L]
        assert inputs[row].tolist()[: len(prompt) + 1] == [EOS, *prompt][:L]


def test_a_validation_set_without_a_document_is_one_sentence(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"a.jsonl has no documents; give another"):
        build(path, cache_dir)


def test_a_document_mask_is_that_of_documents_one_by_one() -> None:
    config = ModelConfig(
        "x", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    keywords = {"vocab_size": 50, "precision": Precision.fp32, "device": torch.device("cpu"), "seed": 0}
    masked, plain = build_model(config, separator_id=EOS, **keywords), build_model(config, **keywords)  # type: ignore[arg-type]
    parts = [[5, 6], [EOS, 7, 8, 9], [EOS, 10], [EOS, 11, 12]]  # the first began before the window
    tokens = torch.tensor([[t for part in parts for t in part]])
    with torch.no_grad():
        together = masked(tokens)[0]
        alone = torch.cat([plain(torch.tensor([part]))[0] for part in parts])
        # Rotary attention depends on distances only, up to fp32 rounding of the rotations.
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        assert (plain(tokens)[0] - alone).abs().max() > 1e-3
    mask = document_mask(tokens, EOS)[0, 0]
    assert mask.sum(1).tolist() == [i + 1 for part in parts for i in range(len(part))]


class Hub(http.server.BaseHTTPRequestHandler):
    """One file of a repository, as the hub answers for it."""

    content = b""

    def do_HEAD(self) -> None:
        self._head()

    def do_GET(self) -> None:
        self._head()
        self.wfile.write(self.content)

    def _head(self) -> None:
        found = self.path == "/some/model/resolve/main/spiece.model"
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"abc"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    Hub.content = train_tokenizer(["the whale " * 50], TrainedTokenizerConfig("trained", vocab_size=268))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield
    server.shutdown()


def test_a_tokenizer_of_the_hub_is_fetched_once(hub: None, cache_dir: Path) -> None:
    train, _ = open_corpora(SyntheticDataConfig("synthetic"), cache_dir)
    config = HubTokenizerConfig("t5", repository="some/model", file="spiece.model")
    tokenizer = build_tokenizer(config, train, cache_dir, lambda _: None, streaming=False)
    assert tokenizer.files == {"tokenizer.model": Hub.content}
    wrong = HubTokenizerConfig("t5", repository="some/model", file="other.model")
    with pytest.raises(
        UserError, match=r"tokenizer=t5 needs other.model of some/model .*tokenizer.path="
    ) as error:
        build_tokenizer(wrong, train, cache_dir, lambda _: None, streaming=False)
    assert "\n" not in str(error.value)
    assert "tokenizer=sentencepiece tokenizer.path=" in str(error.value)


@pytest.mark.parametrize(
    ("repository", "file"),
    [
        ("a b/c/d", "tokenizer.model"),
        ("../..", "tokenizer.model"),
        ("x" * 300, "y"),
        ("some/model", "../../etc"),
    ],
)
def test_a_name_that_the_hub_does_not_take_is_one_sentence(
    repository: str, file: str, hub: None, cache_dir: Path
) -> None:
    train, _ = open_corpora(SyntheticDataConfig("synthetic"), cache_dir)
    config = HubTokenizerConfig("mine", repository=repository, file=file)
    with pytest.raises(UserError, match=r"tokenizer=mine needs .* which cannot be had \(.+\)") as error:
        build_tokenizer(config, train, cache_dir, lambda _: None, streaming=False)
    assert "\n" not in str(error.value)
