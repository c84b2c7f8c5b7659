"""Every data file that a name, a folder or a glob stands for is read, or named with what is wrong with it."""

import gzip
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.corpora import TEXTS, json_lines, write_c4
from helpers.damage import zstd

from rsotrain.config.data import C4DataConfig, FilesDataConfig, HubDataConfig, TrainedTokenizerConfig
from rsotrain.data import finding
from rsotrain.data.build import Data, build_data
from rsotrain.data.documents import BadRows
from rsotrain.data.finding import find_files, folder_files
from rsotrain.data.readers import FileShard
from rsotrain.data.sources import open_corpora
from rsotrain.data.validation import check_files
from rsotrain.errors import UserError


def link_to_nothing(path: Path) -> None:
    path.symlink_to("moved away")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # such names must be short
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)
    os.chdir(here)


def built(data: FilesDataConfig, cache_dir: Path, notify: Callable[[str], None]) -> Data:
    tokenizer = TrainedTokenizerConfig("trained", vocab_size=300)
    return build_data(data, tokenizer, seq_len=8, cache_dir=cache_dir, notify=notify, batch_size=64)


INSTEAD: list[tuple[Callable[[Path], None], str]] = [
    (link_to_nothing, r"b.jsonl is a link to moved away, which does not exist; bring the file back"),
    (link_to_itself, r"b.jsonl cannot be read \(Too many levels of symbolic links\)"),
    (pipe, r"b.jsonl is a named pipe; give a file, which can be read again"),
    (device, r"b.jsonl is a device; give a file"),
    (unix_socket, r"b.jsonl is a socket; give a file"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With two files, a.jsonl and c.jsonl, of five documents each."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "a.jsonl").write_bytes(json_lines(TEXTS[:5]))
    (path / "c.jsonl").write_bytes(json_lines(TEXTS[5:10]))
    return path


@pytest.mark.parametrize("given", ["", "/*.jsonl", "/**/*.jsonl", "/{a,b,c}.jsonl", "/b.jsonl"])
@pytest.mark.parametrize(("put", "sentence"), INSTEAD)
def test_what_is_no_file_is_named_however_the_data_are_given(
    put: Callable[[Path], None], sentence: str, given: str, folder: Path, tmp_path: Path
) -> None:
    put(folder / "b.jsonl")
    for key in ("path", "validation_path"):
        paths = {"path": str(folder / "a.jsonl"), "validation_path": str(folder / "a.jsonl")}
        data = FilesDataConfig("files", **paths | {key: f"{folder}{given}"})
        for check in (check_files, lambda data: open_corpora(data, tmp_path)):
            with pytest.raises(UserError, match=rf"data.{key}: .*{sentence}") as caught:
                check(data)
            assert "\n" not in str(caught.value)
    c4 = C4DataConfig("c4", path=f"{folder}{given}", validation_path=str(folder / "a.jsonl"))
    with pytest.raises(UserError, match=sentence):
        open_corpora(c4, tmp_path)


@pytest.mark.parametrize(("put", "sentence"), INSTEAD)
def test_what_is_no_file_in_a_folder_like_the_hubs_is_named(
    put: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    folder = write_c4(tmp_path / "c4")
    put(folder / "en/b.jsonl")
    with pytest.raises(UserError, match=rf"data.name: .*{sentence}"):
        open_corpora(HubDataConfig(name=str(folder), config="en"), tmp_path)


def test_other_things_that_lead_nowhere_do_not_matter(folder: Path) -> None:
    link_to_nothing(folder / "latest")
    link_to_nothing(folder / ".hidden.jsonl")
    pipe(folder / "log")
    assert [file.name for file in find_files(str(folder), "data.path")] == ["a.jsonl", "c.jsonl"]
    assert [file.name for file in find_files(f"{folder}/**/*.jsonl", "data.path")] == ["a.jsonl", "c.jsonl"]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.jsonl").write_bytes(json_lines(TEXTS[10:15]))
    (folder / "link").symlink_to(other)
    (other / "round").symlink_to(folder)
    (folder / "again").symlink_to(folder)
    expected = ["a.jsonl", "c.jsonl", "link/b.jsonl"]
    for given in (str(folder), f"{folder}/**/*.jsonl"):
        found = find_files(given, "data.path")
        assert [str(file.relative_to(folder)) for file in found] == expected
    assert folder_files(folder, "data.name") == found


def test_a_folder_that_cannot_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "closed").mkdir()
    listed = os.listdir

    def listdir(path: Path) -> list[str]:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(finding.os, "listdir", listdir)
    for given in (str(folder), f"{folder}/*/*.jsonl", f"{folder}/**/*.jsonl"):
        with pytest.raises(UserError, match=r"the folder .*closed cannot be read \(Permission denied\)"):
            find_files(given, "data.path")


def test_a_compression_that_is_not_read_is_named(folder: Path) -> None:
    (folder / "b.jsonl.bz2").write_bytes(b"BZh")
    with pytest.raises(UserError, match=r"b.jsonl.bz2 is compressed with what is not read .*; decompress it"):
        find_files(str(folder), "data.path")
    (folder / "b.jsonl.bz2").rename(folder / "notes.bz2")
    assert len(find_files(str(folder), "data.path")) == 2


def test_folders_in_the_place_of_files_are_their_files(folder: Path) -> None:
    """As Spark writes a table: a folder with its name, parts inside."""
    table = folder / "b.jsonl"
    table.mkdir()
    for name in ("part-1.jsonl", "part-0.jsonl", ".part-0.jsonl.crc", "_SUCCESS"):
        (table / name).write_bytes(json_lines(TEXTS[:1]))
    expected = ["a.jsonl", "b.jsonl/part-0.jsonl", "b.jsonl/part-1.jsonl", "c.jsonl"]
    for given in ("", "/*.jsonl", "/**/*.jsonl", "/[a-c].jsonl"):
        found = find_files(f"{folder}{given}", "data.path")
        assert [str(file.relative_to(folder)) for file in found] == expected
    (folder / "sub").mkdir()
    assert len(find_files(f"{folder}/*", "data.path")) == 4
    for file in table.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"b.jsonl holds no data files"):
        find_files(f"{folder}/*.jsonl", "data.path")


@pytest.mark.parametrize("name", ["x [v1]", "a*b", "what?", "{a,b}", "[[]", "**"])
def test_what_exists_under_the_given_name_is_no_pattern(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name / "sub"
    folder.mkdir(parents=True)
    decoy = tmp_path / "x v" / "sub"
    decoy.mkdir(parents=True)
    for place in (folder, decoy):
        (place / "a1.jsonl").write_bytes(json_lines(TEXTS[:5]))
        (place / "a[1].jsonl").write_bytes(json_lines(TEXTS[:5]))
    for given, found in (
        (f"{tmp_path / name}", ["a1.jsonl", "a[1].jsonl"]),
        (f"{tmp_path / name}/*/a*.jsonl", ["a1.jsonl", "a[1].jsonl"]),
        (f"{tmp_path / name}/sub/a[1].jsonl", ["a[1].jsonl"]),
        (f"{tmp_path / name}/sub/a[[]1].jsonl", ["a[1].jsonl"]),
        (f"{tmp_path / name}/**/a?.jsonl", ["a1.jsonl"]),
        (f"{tmp_path / name}/sub/{{a1,a[[]1]}}.jsonl", ["a1.jsonl", "a[1].jsonl"]),
    ):
        assert find_files(given, "data.path") == [folder / file for file in found], given


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{a,c}.jsonl", ["a.jsonl", "c.jsonl"]),
        ("{c,a,a}.jsonl", ["a.jsonl", "c.jsonl"]),
        ("{.,sub}/*.jsonl", ["a.jsonl", "c.jsonl", "sub/d1.jsonl", "sub/d2.jsonl"]),
        ("{a.jsonl,sub/d2.jsonl}", ["a.jsonl", "sub/d2.jsonl"]),
        ("{a,sub/d{1,2}}.jsonl", ["a.jsonl", "sub/d1.jsonl", "sub/d2.jsonl"]),
        ("{a,sub/{d1,d2}}.json{l,l}", ["a.jsonl", "sub/d1.jsonl", "sub/d2.jsonl"]),
        ("su{b,}/d1.jsonl", None),
        ("{a}.jsonl", None),
        ("{a,b}.jsonl", None),
        ("{a,c.jsonl", None),
    ],
)
def test_braces_stand_for_each_of_their_parts(pattern: str, expected: list[str] | None, folder: Path) -> None:
    (folder / "sub").mkdir()
    for name in ("d1", "d2"):
        (folder / f"sub/{name}.jsonl").write_bytes(json_lines(TEXTS[:5]))
    if expected is None:  # also where one of several parts matches nothing
        with pytest.raises(UserError, match="no file matches it as a glob"):
            find_files(f"{folder}/{pattern}", "data.path")
    else:
        assert find_files(f"{folder}/{pattern}", "data.path") == [folder / name for name in expected]


@pytest.mark.parametrize(
    "pattern", ["{a,b}" * 40, "{" * 5000, "{a," * 2000 + "}" * 2000, "*b" * 999, "a" * 3000]
)
def test_absurd_patterns_are_one_short_sentence(pattern: str, folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.path") as caught:
        find_files(f"{folder}/{pattern}", "data.path")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("path", ["~no_such_user/x.jsonl", "a\0b.jsonl", "a\0*.jsonl"])
def test_what_is_no_path_is_one_sentence(path: str) -> None:
    with pytest.raises(UserError, match=r"data.path.* is no path \("):
        find_files(path, "data.path")


def test_odd_names_are_shown_on_one_line_and_as_text(tmp_path: Path, cache_dir: Path) -> None:
    odd = tmp_path / os.fsdecode(b"a\n\x1b[31m\xff.jsonl")
    odd.write_bytes(b"{")
    data = FilesDataConfig("files", path=str(odd), validation_path=str(odd))
    told: list[str] = []
    with pytest.raises(UserError, match=r"a\\n\\x1b\[31m\\udcff.jsonl: line 1 is not valid JSON") as caught:
        build_data(
            data, TrainedTokenizerConfig("t"), seq_len=8, cache_dir=tmp_path / "cache", notify=told.append
        )
    for sentence in (*told, str(caught.value)):
        assert sentence.isprintable()


# --- empty files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_empty_files_of_plain_text_beside_others_are_said_and_hold_nothing(
    streaming: bool, folder: Path, tmp_path: Path
) -> None:
    (folder / "b.jsonl").touch()
    data = FilesDataConfig("files", path=str(folder), validation_path=str(folder), streaming=streaming)
    check_files(data)
    corpus, _ = open_corpora(data, tmp_path)
    assert [document.text for document in corpus.documents(lambda _: None)] == TEXTS[:10]
    told: list[str] = []
    built(data, tmp_path, told.append).train.close()
    assert told[0] == f"warning: 1 of 3 files are empty ({folder / 'b.jsonl'})"
    assert len([line for line in told if "are empty" in line]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_a_row_hold_nothing(streaming: bool, tmp_path: Path) -> None:
    folder, plain = tmp_path / "data", tmp_path / "plain"
    for path in (folder, plain):
        path.mkdir()
        (path / "m.jsonl").write_bytes(json_lines(TEXTS[:40]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "b.jsonl.zst").write_bytes(zstd(b""))
    (folder / "c.jsonl").write_bytes(b"\n")
    empty = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(empty, folder / "y.parquet")
    with pa.ipc.new_file(folder / "z.arrow", empty.schema) as out:
        out.write_table(empty)
    rows = []
    for path in (folder, plain):
        data = FilesDataConfig(
            "files", path=str(path), validation_path=str(plain), streaming=streaming, shuffle=False, lanes=1
        )
        train = built(data, tmp_path / "cache", lambda _: None).train
        rows.append(train.batch(train.order(0).indices(0, 64)))
        train.close()
    assert rows[0][0].equal(rows[1][0])


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.parquet", "b.arrow"])
def test_an_empty_file_of_a_format_that_is_never_empty_is_refused(name: str, folder: Path) -> None:
    (folder / name).touch()
    with pytest.raises(UserError, match=rf"{name} is empty; leave it out"):
        find_files(str(folder), "data.path")


def test_nothing_but_empty_files_is_refused(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"data.path=.* all 2 files are empty"):
        find_files(str(folder), "data.path")


# --- files that change -----------------------------------------------------------------------------


def write_more(path: Path) -> None:
    path.write_bytes(json_lines(TEXTS[5:30]))


def write_otherwise(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"ship", b"boat"))
    os.utime(path, ns=(1, 1))  # a clock of a second would not tell


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [
    (write_more, "has changed since it was first looked at"),
    (write_otherwise, "has changed since it was first looked at"),
    (remove, "cannot be read"),
    (link_to_nothing, "is a link to moved away"),
    (pipe, "is a named pipe"),
]


@pytest.mark.parametrize(("change", "sentence"), CHANGES)
@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_a_file_that_changes_after_its_fingerprint_is_named(
    change: Callable[[Path], None], sentence: str, when: str, folder: Path, tmp_path: Path
) -> None:
    file = folder / "c.jsonl"
    corpus, _ = open_corpora(FilesDataConfig("files", path=str(folder), validation_fraction=0.5), tmp_path)
    rows = corpus.shard_documents(1, BadRows(0, lambda _: None))
    if when == "while it is read":
        next(rows)
    if change in (link_to_nothing, pipe):
        file.unlink()
    change(file)
    with pytest.raises(UserError, match=rf"c.jsonl {sentence}"):
        list(rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_build_from_a_file_that_changes_meanwhile_leaves_nothing_in_the_cache(
    streaming: bool, folder: Path, tmp_path: Path
) -> None:
    data = FilesDataConfig("files", path=str(folder), validation_path=str(folder), streaming=streaming)

    def change(message: str) -> None:
        if "training a tokenizer" in message:
            write_otherwise(folder / "c.jsonl")

    with pytest.raises(UserError, match=r"c.jsonl has changed since"):
        built(data, tmp_path / "cache", change)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_file_that_vanishes_in_a_later_epoch_of_a_stream_is_named(folder: Path, tmp_path: Path) -> None:
    data = FilesDataConfig(
        "files", path=str(folder), validation_path=str(folder), streaming=True, lanes=1, workers=1
    )
    train = built(data, tmp_path, lambda _: None).train
    order = train.order(0)

    def go_on(steps: range) -> None:
        for step in steps:
            train.batch(order.indices(64 * step, 64))

    go_on(range(1))
    (folder / "c.jsonl").unlink()
    with pytest.raises(UserError, match=r"c.jsonl cannot be read \(No such file or directory\)"):
        go_on(range(1, 200))  # past what was made ahead
    train.close()


@pytest.mark.parametrize("change", ["removed", "added", "rewritten"])
def test_a_folder_like_the_hubs_that_changes_is_named(change: str, tmp_path: Path) -> None:
    folder = write_c4(tmp_path / "c4")
    train, _ = open_corpora(HubDataConfig(name=str(folder), config="en"), tmp_path)
    documents = train.documents(lambda _: None)
    next(documents)
    shard = folder / "en/c4-train.00002-of-00003.json.gz"
    if change == "removed":
        shard.unlink()
    elif change == "added":
        shutil.copy(shard, shard.with_name("new.json.gz"))
    else:
        shard.write_bytes(shard.read_bytes())
        os.utime(shard, ns=(1, 1))
    with pytest.raises(UserError, match=r"the files of .* have changed since they were first looked at"):
        list(documents)


def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl", "a.parquet"):
        file = tmp_path / name
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
        with pytest.raises(UserError, match=rf"{name} is a pointer of Git LFS .* git lfs pull"):
            list(FileShard(file, ("text",)).rows())
