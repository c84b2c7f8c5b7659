"""The text of a row: columns of every type, fields inside others, and folders read through ``datasets``."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers.damage import JSON_LINES, TEXTS, WHOLE

from rsotrain.config.data import HubDataConfig, InstructionsDataConfig, Packing, TrainedTokenizerConfig
from rsotrain.config.rules_data import validate_data
from rsotrain.config.schema import Config
from rsotrain.data.documents import Corpus, TextField
from rsotrain.data.readers import FileShard
from rsotrain.data.sources import open_corpora
from rsotrain.errors import UserError

VALUES = ["a", "b é", None, "c" * 50, "b é", "", "🙂"]
VIEWS = pa.array(["a", "b é", "c" * 50, "", "🙂"], pa.string_view())
PLACES = pa.array([0, 1, None, 2, 1, 3, 4], pa.int8())
ENCODINGS: dict[str, pa.Array] = {
    "string": pa.array(VALUES),
    "large_string": pa.array(VALUES, pa.large_string()),
    "string_view": pa.array(VALUES, pa.string_view()),
    "dictionary": pa.array(VALUES).dictionary_encode(),
    "dictionary of large strings": pa.array(VALUES, pa.large_string()).dictionary_encode(),
    "dictionary of views": pa.DictionaryArray.from_arrays(
        pa.array([0, 1, None, 2, 1, 3, 4], pa.int8()), VIEWS
    ),
    "run_end_encoded": pc.run_end_encode(pa.array(VALUES)),
    "extension": pa.array(VALUES, pa.json_()),
    "null": pa.nulls(len(VALUES)),
}
NO_TEXT: dict[str, pa.Array] = {
    "list": pa.array([["a"]] * 3),
    "binary": pa.array([b"a"] * 3),
    "int64": pa.array([1, 2, 3]),
    "timestamp": pa.array([2**62] * 3, pa.timestamp("us")),  # which Python cannot hold
    "duration": pa.array([2**62] * 3, pa.duration("s")),
    "struct": pa.array([{"inner": "a"}] * 3),
    "map": pa.array([[("a", "b")]] * 3, pa.map_(pa.string(), pa.string())),
    "dictionary": pa.array([1, 2, 3]).dictionary_encode(),
}
FORMATS = ("parquet", "file", "stream")


def read(path: Path, field: str = "text") -> list[str]:
    corpus = Corpus("x", (FileShard(path, (field,)),), TextField(field), "")
    return [document.text for document in corpus.documents(lambda _: None)]


def write(path: Path, kind: str, table: pa.Table) -> Path:
    if kind == "parquet":
        path = path.with_suffix(".parquet")
        try:
            pq.write_table(table, path, row_group_size=3)
        except pa.ArrowNotImplementedError as error:
            pytest.skip(str(error))
        return path
    path = path.with_suffix(".arrow")
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(path, table.schema) as out:
        out.write_table(table, max_chunksize=3)
    return path


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_strings_of_every_encoding_are_read(encoding: str, kind: str, tmp_path: Path) -> None:
    column = ENCODINGS[encoding]
    doc = pa.StructArray.from_arrays([column], ["text"], mask=pa.array([False] * 6 + [True]))
    table = pa.table({"id": range(len(VALUES)), "text": column, "doc": doc})
    values = [None] * len(VALUES) if encoding == "null" else VALUES
    path = write(tmp_path / "a", kind, table)
    for field, expected in (("text", values), ("doc.text", [*values[:-1], None])):
        for first, step in ((0, 1), (1, 2), (2, 3), (5, 4)):
            rows = list(FileShard(path, (field,)).rows(first, step))
            assert [number for number, _ in rows] == list(range(first, len(VALUES), step))
            assert [row[field] for _, row in rows] == expected[first::step]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("column", NO_TEXT)
def test_a_column_without_text_is_one_sentence(column: str, kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a", kind, pa.table({"text": NO_TEXT[column]}))
    column = "int64" if (kind, column) == ("parquet", "dictionary") else column  # it has strings in them only
    with pytest.raises(UserError, match=rf"column 'text' holds {column}.* and no text; make it a string"):
        read(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_names_of_columns_are_resolved_from_the_outside(kind: str, tmp_path: Path) -> None:
    inner = pa.array([{"c": "in a.b", "x": 1}])
    outer = pa.array([{"b.c": "in a", "b": {"c": "in b", "d": "d"}}])
    path = write(tmp_path / "a", kind, pa.table({"a": outer, "a.b": inner, "a.b.c": ["literal"]}))
    assert read(path, "a.b.c") == ["literal"]
    assert read(path, "a.b.d") == ["d"]
    path = write(tmp_path / "b", kind, pa.table({"a": outer, "a.b": inner}))
    assert read(path, "a.b.c") == ["in a"]
    assert read(write(tmp_path / "c", kind, pa.table({"a.b": inner})), "a.b.c") == ["in a.b"]
    for field, listed in (("z", "a, a.b"), ("a.z", "a.b.c, .*a.b.d, a.b.x"), ("a.b.c.z", "a.b.c")):
        with pytest.raises(UserError, match=rf"has no column '{field}' \(its columns: {listed}"):
            read(path, field)
    double = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pytest.raises(UserError, match=r"has several columns 'text'; leave one of them"):
        read(write(tmp_path / "d", kind, double))


def test_a_table_inside_a_compressed_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(WHOLE["a.parquet"]))
    with pytest.raises(UserError, match=r"a Parquet file inside gzip, which is not read; decompress it"):
        read(tmp_path / "a.parquet.gz")


# --- fields inside others --------------------------------------------------------------------------


def test_fields_inside_others_and_literal_ones_with_a_dot(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"doc": {"text": "inside"}},
        {"doc.text": "literal", "doc": {"text": "inside"}},
        {"doc": {"meta": 1, "text": "again"}, "doc.other": 2},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path, "doc.text") == ["inside", "literal", "again"]
    path.write_text(json.dumps({"a": {"b.c": "in a"}, "a.b": {"c": "in a.b"}}))
    assert read(path, "a.b.c") == ["in a"]
    for row, sentence in (
        ({"doc": 3}, r"line 1 has no field 'doc.text' \(its fields: doc\)"),
        ({"doc": {"body": "a"}}, r"line 1 has no field 'doc.text' \(its fields: doc\)"),
        ({"doc": {"text": {"text": "a"}}}, r"line 1 has a value of type dict in the field 'doc.text'"),
    ):
        path.write_text(json.dumps(row))
        with pytest.raises(UserError, match=sentence):
            read(path, "doc.text")


def test_instructions_take_fields_inside_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"q": {"text": "2+2?"}, "a": {"text": "4"}, "plain": "{x}"}))
    data = InstructionsDataConfig(
        "instructions",
        packing=Packing.padded,
        path=str(path),
        validation_path=str(path),
        prompt_template="{{Q}}: {q.text} {plain}\nA: ",
        response_field="a.text",
    )
    validate_data(Config(data=data, tokenizer=TrainedTokenizerConfig("trained")))
    train, _ = open_corpora(data, tmp_path)
    assert list(train.documents(lambda _: None)) == [("4", "{Q}: 2+2? {x}\nA: ")]


# --- folders like the hub's ------------------------------------------------------------------------


def hub(folder: Path, field: str = "text") -> list[str]:
    data = HubDataConfig(name=str(folder), validation_split=None, validation_fraction=0.5, text_field=field)
    corpora = open_corpora(data, folder.parent / "cache")
    texts = [document.text for corpus in corpora for document in corpus.documents(lambda _: None)]
    return sorted(texts, key=TEXTS.index)


@pytest.mark.parametrize(
    "name", ["plain.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "pzstd.jsonl.zst", "pages.parquet"]
)
def test_a_folder_like_the_hubs_is_read_or_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    path = folder / f"train.{name.split('.', 1)[1]}"
    path.write_bytes(WHOLE[name])
    assert hub(folder) == hub(folder, "doc.text") == TEXTS
    for field in ("body", "doc.body"):
        with pytest.raises(UserError, match=rf"(column|field) '{field}'"):
            hub(folder, field)
    half = len(WHOLE[name]) // 2
    for number, content in enumerate((WHOLE[name][:half], WHOLE[name][:half] + bytes(half), b"")):
        other = tmp_path / str(number)
        other.mkdir()
        (other / path.name).write_bytes(content)
        with pytest.raises(UserError, match=r"cannot be read as a folder of the Hugging Face hub") as caught:
            hub(other)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("repository.py", "raise SystemExit"),
        ("README.md", "---\nconfigs: [}\n---\n"),
        ("README.md", "---\nconfigs: 3\n---\n"),
        ("README.md", "---\ndataset_info:\n  features:\n  - name: text\n    dtype: nonsense\n---\n"),
    ],
)
def test_a_folder_that_datasets_cannot_load_is_one_sentence(name: str, content: str, tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(JSON_LINES)
    (folder / name).write_text(content)
    with pytest.raises(
        UserError, match=r"cannot be read as a folder of the Hugging Face hub \(.+\)"
    ) as caught:
        hub(folder)
    assert str(caught.value).isprintable()


def test_an_empty_shard_of_a_folder_like_the_hubs_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "train-0.jsonl").touch()
    (folder / "train-1.jsonl").write_bytes(JSON_LINES)
    assert hub(folder) == TEXTS
