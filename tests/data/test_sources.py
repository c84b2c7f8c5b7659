"""Every kind of file and source gives the same documents, bad rows are counted, validation is held out."""

import gzip
import json
import lzma
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import TEXTS, json_lines, write_c4

from rsotrain.config.data import (
    C4DataConfig,
    DataConfig,
    FilesDataConfig,
    HubDataConfig,
    InstructionsDataConfig,
    SampleBy,
    SyntheticDataConfig,
)
from rsotrain.data.documents import Corpus, Document, sample_texts
from rsotrain.data.readers import FileShard
from rsotrain.data.rows import BadRow
from rsotrain.data.sources import open_corpora
from rsotrain.errors import UserError


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"other": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=150)


def write_arrow_file(path: Path) -> None:
    with pa.ipc.new_file(path, pa.schema([("text", pa.string())])) as out:
        out.write_table(pa.table({"text": TEXTS}), max_chunksize=300)


def write_arrow_stream(path: Path) -> None:
    with pa.ipc.new_stream(path, pa.schema([("text", pa.large_string())])) as out:
        out.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string())}), max_chunksize=300)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines(TEXTS)),
    "a.json.gz": lambda path: path.write_bytes(gzip.compress(json_lines(TEXTS))),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(json_lines(TEXTS))),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.compress(json_lines(TEXTS), "zstd", asbytes=True)),
    "two_frames.jsonl.zst": lambda path: path.write_bytes(
        b"".join(pa.compress(json_lines(part), "zstd", asbytes=True) for part in (TEXTS[:300], TEXTS[300:]))
    ),
    "a.parquet": write_parquet,
    "a.arrow": write_arrow_file,
    "stream.arrow": write_arrow_stream,
}


def texts(corpus: Corpus, notify: Callable[[str], None] = lambda _: None) -> list[str]:
    return [document.text for document in corpus.documents(notify)]


def train_texts(data: DataConfig, cache_dir: Path) -> list[str]:
    return texts(open_corpora(data, cache_dir)[0])


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents_from_any_row_on(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = FilesDataConfig("files", path=str(path), validation_path=str(path))
    assert train_texts(data, tmp_path) == TEXTS
    shard = FileShard(path, ("text",))
    for first, step in ((0, 3), (299, 1), (301, 7), (699, 1), (700, 1)):
        rows = list(shard.rows(first, step))
        assert [number for number, _ in rows] == list(range(first, 700, step))
        assert [row["text"] for _, row in rows] == TEXTS[first::step]


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        (None, ["one\ntwo\n\nthree é\n", "last"]),
        (SampleBy.paragraph, ["one\ntwo", "three é", "last"]),
        (SampleBy.line, ["one", "two", "three é", "last"]),
    ],
)
def test_text_files(sample_by: SampleBy | None, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree é\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"last"))
    data = FilesDataConfig("files", path=str(tmp_path), validation_path=str(tmp_path), sample_by=sample_by)
    assert train_texts(data, tmp_path) == expected


def test_a_folder_and_a_glob_are_their_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    for name, part in (("b.jsonl", TEXTS[:5]), ("sub/c.jsonl", TEXTS[5:9]), ("a.jsonl", TEXTS[9:12])):
        (folder / name).write_bytes(json_lines(part))
    (folder / "notes.pdf").write_bytes(b"no data")
    for path, expected in (
        (folder, TEXTS[9:12] + TEXTS[:5] + TEXTS[5:9]),
        (folder / "*.jsonl", TEXTS[9:12] + TEXTS[:5]),
    ):
        data = FilesDataConfig("files", path=str(path), validation_path=str(path))
        assert train_texts(data, tmp_path) == expected


def test_a_folder_without_what_is_hidden_in_it_and_not_of_two_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / ".cache").mkdir(parents=True)
    for name in ("a.jsonl", ".b.jsonl", ".cache/c.jsonl"):
        (folder / name).write_bytes(json_lines([name]))
    data = FilesDataConfig("files", path=str(folder), validation_path=str(folder))
    assert train_texts(data, tmp_path) == ["a.jsonl"]
    (folder / "README.md").write_text("no document")
    with pytest.raises(UserError, match=r"data.path=.* holds text \(README.md\) beside JSON .* a glob"):
        train_texts(data, tmp_path)
    data = FilesDataConfig("files", path="", validation_path=str(folder))
    with pytest.raises(UserError, match=r"data.path is empty"):  # not the present folder
        train_texts(data, tmp_path)


def test_c4_from_files_and_through_datasets_are_the_same(tmp_path: Path) -> None:
    folder = write_c4(tmp_path / "c4")
    files = C4DataConfig(
        "c4",
        path=str(folder / "en/c4-train.*.json.gz"),
        validation_path=str(folder / "en/c4-validation.*.json.gz"),
    )
    hub = HubDataConfig(name=str(folder), config="en")
    for from_files, from_hub in zip(open_corpora(files, tmp_path), open_corpora(hub, tmp_path), strict=True):
        assert texts(from_files) == texts(from_hub)
    train, validation = open_corpora(hub, tmp_path)
    assert texts(train) == TEXTS[:300]
    assert texts(validation) == TEXTS[600:]
    assert len(train.shards) == 3  # each rank opens only the files of its lanes
    rows = [(n, row["text"]) for n, row in train.shards[1].rows(first=97, step=2)]
    assert rows == [(97, TEXTS[197]), (99, TEXTS[199])]


def test_a_folder_read_as_from_the_hub_is_told_from_what_it_was(tmp_path: Path) -> None:
    folder = write_c4(tmp_path / "c4")
    hub = HubDataConfig(name=str(folder), config="en")
    before = [corpus.fingerprint for corpus in open_corpora(hub, tmp_path)]
    assert [corpus.fingerprint for corpus in open_corpora(hub, tmp_path)] == before
    shard = folder / "en/c4-validation.00000-of-00001.json.gz"
    shard.write_bytes(gzip.compress(json_lines(TEXTS[599:])))
    for corpus, old in zip(open_corpora(hub, tmp_path), before, strict=True):
        assert corpus.fingerprint != old


def test_a_hub_without_a_connection_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"allenai/c4/en/train cannot be read .*data=c4 data.path=") as caught:
        open_corpora(C4DataConfig("c4"), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_without_the_column_is_one_sentence(tmp_path: Path) -> None:
    folder = write_c4(tmp_path / "c4")
    train, _ = open_corpora(HubDataConfig(name=str(folder), config="en", text_field="body"), tmp_path)
    with pytest.raises(UserError, match=r"no column 'body' \(its columns: text, timestamp, url\)"):
        texts(train)


def test_held_out_documents_are_a_fraction_by_hash(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines([*TEXTS, *TEXTS]))
    train, held_out = (
        texts(corpus)
        for corpus in open_corpora(
            FilesDataConfig("files", path=str(path), validation_fraction=0.1), tmp_path
        )
    )
    assert sorted(train + held_out) == sorted([*TEXTS, *TEXTS])
    assert not set(train) & set(held_out)  # a document that occurs twice is on one side
    # binomial over 700 distinct documents: mean 70, standard deviation 8; five of them
    assert 30 < len(set(held_out)) < 110
    other = open_corpora(FilesDataConfig("files", path=str(path), validation_fraction=0.2), tmp_path)[1]
    assert set(held_out) < set(texts(other))


def test_bad_rows_are_named_and_skipped_up_to_the_limit(tmp_path: Path) -> None:
    lines = json_lines(TEXTS[:20]).splitlines(keepends=True)
    lines[4], lines[11] = b'{"text": 3}\n', b"\xff\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(lines))

    def corpus(limit: int) -> Corpus:
        data = FilesDataConfig("files", path=str(path), validation_path=str(path), max_bad_rows=limit)
        return open_corpora(data, tmp_path)[0]

    told: list[str] = []
    assert texts(corpus(2), told.append) == TEXTS[:4] + TEXTS[5:11] + TEXTS[12:20]
    assert [re.sub(".*jsonl: ", "", line) for line in told] == [
        "line 5 has a value of type int in the field 'text'; make it a string; skipped",
        "line 12 is not UTF-8; convert the file, for example with iconv -t UTF-8; skipped",
    ]
    with pytest.raises(
        UserError, match=r"line 12 is not UTF-8.*; data.max_bad_rows=1 allows no more bad rows"
    ):
        texts(corpus(1))


def test_a_table_with_strings_that_are_not_utf8_names_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    text = pa.array([*(text.encode() for text in TEXTS[:500]), b"\xff", b"last"]).view(pa.string())
    pq.write_table(pa.table({"text": text}), path)
    rows = FileShard(path, ("text",)).rows(first=1, step=100)
    assert [row["text"] for _, row in rows] == [*TEXTS[1:500:100], "last"]
    numbers = [number for number, row in FileShard(path, ("text",)).rows() if isinstance(row, BadRow)]
    assert numbers == [500]
    data = FilesDataConfig("files", path=str(path), validation_path=str(path), max_bad_rows=1)
    assert train_texts(data, tmp_path) == [*TEXTS[:500], "last"]
    data.max_bad_rows = 0
    with pytest.raises(UserError, match=r"a.parquet: row 501 is not UTF-8"):
        train_texts(data, tmp_path)


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow"])
def test_a_damaged_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    path.write_bytes(path.read_bytes()[:-60])
    corpus, _ = open_corpora(FilesDataConfig("files", path=str(path), validation_path=str(path)), tmp_path)
    with pytest.raises(UserError, match=rf"{name} is not a whole \w+ file \(.*\); copy it again") as caught:
        texts(corpus)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_missing_column_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    data = FilesDataConfig("files", path=str(path), validation_path=str(path), text_field="body")
    with pytest.raises(UserError, match=r"has no column 'body' \(its columns: .*text\).*data.text_field"):
        train_texts(data, tmp_path)


def test_an_unknown_kind_and_an_empty_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(b"x")
    (tmp_path / "empty.jsonl").touch()
    for name, sentence in (("a.pdf", "is of no known kind"), ("empty.jsonl", "is empty; leave it out")):
        data = FilesDataConfig("files", path=str(tmp_path / name), validation_fraction=0.1)
        with pytest.raises(UserError, match=sentence):
            open_corpora(data, tmp_path)


def test_instructions_fill_a_template(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"q": "2+2?", "a": "4", "x": 1}, {"q": "{odd}", "a": "yes"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionsDataConfig(
        "instructions",
        path=str(path),
        validation_path=str(path),
        prompt_template="Q: {q}\nA: ",
        response_field="a",
    )
    train, _ = open_corpora(data, tmp_path)
    documents = list(train.documents(lambda _: None))
    assert documents == [("4", "Q: 2+2?\nA: "), ("yes", "Q: {odd}\nA: ")]


def test_synthetic_documents_are_a_function_of_the_seed(tmp_path: Path) -> None:
    def corpora(seed: int) -> list[list[str]]:
        data = SyntheticDataConfig(
            "synthetic", num_documents=30, num_validation_documents=5, corpus_seed=seed
        )
        return [texts(corpus) for corpus in open_corpora(data, tmp_path)]

    train, validation = corpora(0)
    assert (len(train), len(validation)) == (30, 5)
    assert not set(train) & set(validation)
    assert corpora(0) == [train, validation]
    assert corpora(1)[0] != train
    assert all(len(text.split()) == 200 for text in train)


def test_a_sample_is_bounded_fair_and_independent_of_order(tmp_path: Path) -> None:
    documents = [Document(text) for text in TEXTS]
    total = sum(len(text.encode()) for text in TEXTS)
    sample = sample_texts(iter(documents), total // 4, None)
    assert sample == sample_texts(iter(documents[::-1]), total // 4, None)
    assert total // 4 <= sum(len(text.encode()) for text in sample) < total // 4 + 100
    places = [TEXTS.index(text) for text in sample]
    # of about 175 draws without replacement from 0 … 699, the mean has standard deviation 13; five of them
    assert abs(sum(places) / len(places) - 350) < 65
    assert sorted(sample_texts(iter(documents), 10 * total, None)) == sorted(TEXTS)
    assert len(sample_texts(iter(documents), total, total // 10)) < 100


# --- a fraction of few documents ----------------------------------------------------------------------


def books(folder: Path, number: int = 3) -> list[str]:
    """Texts of some hundred words, as many files."""
    folder.mkdir()
    found = [" ".join(f"b{book}w{word}" for word in range(300)) for book in range(number)]
    for book, text in enumerate(found):
        (folder / f"{book}.txt").write_text(text)
    return found


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.999])
def test_of_a_few_books_the_end_of_each_is_held_out(fraction: float, tmp_path: Path) -> None:
    """No file as a whole is in one of the two parts. Nothing is lost, and words stay whole."""
    whole = books(tmp_path / "books")
    data = FilesDataConfig("files", path=str(tmp_path / "books"), validation_fraction=fraction)
    train, held_out = open_corpora(data, tmp_path)
    begins, ends = texts(train), texts(held_out)
    assert [begin + end for begin, end in zip(begins, ends, strict=True)] == whole
    assert all(begin.endswith(" ") for begin in begins)
    for text, end in zip(whole, ends, strict=True):
        assert 0 <= fraction - len(end) / len(text) < 10 / len(text)  # less than a word and a space
    assert train.note is not None
    assert re.search(r"leaves none of 3 documents .*, so the end of each is held out$", train.note)
    assert train.key() != replace(train, by_ends=False).key()
    again = open_corpora(data, tmp_path)  # from the cache
    assert (texts(again[0]), texts(again[1])) == (begins, ends)


def test_whole_documents_are_held_out_wherever_there_are_enough(tmp_path: Path) -> None:
    whole = books(tmp_path / "books", 40)
    data = FilesDataConfig("files", path=str(tmp_path / "books"), validation_fraction=0.3)
    train, held_out = open_corpora(data, tmp_path)
    assert sorted(texts(train) + texts(held_out)) == sorted(whole)
    assert (train.note, train.by_ends, "by_ends" in train.key()) == (None, False, False)


@pytest.mark.parametrize(
    ("fraction", "said"), [(0.001, "to validate on; raise"), (0.999, "to train on; lower")]
)
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_fraction_that_leaves_nothing_is_refused_before_anything_is_tokenised(
    suffix: str, fraction: float, said: str, tmp_path: Path
) -> None:
    """Rows, and lines of a text, are not cut."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(json_lines(TEXTS[:4]) if suffix == "jsonl" else b"one\ntwo\nthree\nfour\n")
    data = FilesDataConfig("files", path=str(path), validation_fraction=fraction)
    data.sample_by = None if suffix == "jsonl" else SampleBy.line
    sentence = (
        f"data.validation_fraction={fraction} leaves none of the 4 documents of the data file .* {said} it"
    )
    with pytest.raises(UserError, match=sentence):
        open_corpora(data, tmp_path)
