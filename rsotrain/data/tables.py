"""Parquet and Arrow files -> rows of the columns that hold text, some rows at a time."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rsotrain.data.decompression import compression
from rsotrain.data.finding import shown
from rsotrain.data.rows import BadRow, Damaged, Row, names, not_utf8, outermost, reason, splits
from rsotrain.errors import UserError, require

BATCH_ROWS = 256  # bounds memory: documents may be whole books
ARROW_FILE = b"ARROW1"

_Place = tuple[str, ...]


def table_rows(
    path: Path, suffix: str, columns: tuple[str, ...], first: int, step: int
) -> Iterator[tuple[int, Row | BadRow]]:
    """(number, row) of the rows first, first + step, …; a row holds text, or None, under each of ``columns``.

    Raises UserError for a column that is absent or is no text, OSError, and Damaged for a file that makes no
    sense.
    """
    import pyarrow as pa

    kind = f"{suffix[1:].capitalize()} file"
    if (packed := compression(path)) is not None:
        raise UserError(
            f"{shown(path)} is a {kind} inside {packed}, which is not read; decompress it (Parquet and Arrow"
            " compress their own columns)"
        )
    try:
        number = 0
        batches = _parquet_batches(path, columns) if suffix == ".parquet" else _arrow_batches(path, columns)
        for places, batch in batches:
            offset = max(first - number, (first - number) % step)
            if offset < batch.num_rows:
                wanted = range(offset, batch.num_rows, step)
                texts = [_texts(batch, place, wanted) for place in places]
                for row, values in zip(wanted, zip(*texts, strict=True), strict=True):
                    yield number + row, _row(columns, values, number + row)
            number += batch.num_rows
    except pa.ArrowNotImplementedError as error:
        raise UserError(f"{shown(path)} holds what is not read ({reason(error)}); write it anew") from error
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter for the names of columns
        raise Damaged(f"{kind} ({reason(error)})") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise Damaged(f"{kind} ({reason(error)})") from error  # Arrow's word for what makes no sense, too


def _parquet_batches(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[list[_Place], Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        places = _places(path, file.schema_arrow, columns)
        for group in range(file.num_row_groups):  # a dictionary inside a struct must not change on the way
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
                yield places, batch


def _arrow_batches(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[list[_Place], Any]]:
    import pyarrow as pa

    with path.open("rb") as file:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    with path.open("rb") as file, pa.memory_map(str(path)) as source:
        mapped = source.size()
        opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        places = _places(path, opened.schema, columns)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else iter(opened)
        while True:
            _check_length(file, mapped)
            if (batch := next(batches, None)) is None:
                return
            batch.validate()  # its lengths; what lies inside is checked where it is used
            for start in range(0, batch.num_rows, BATCH_ROWS):
                _check_length(file, mapped)
                yield places, batch.slice(start, BATCH_ROWS)


def _check_length(file: BinaryIO, mapped: int) -> None:
    """Raises Damaged where a mapped file has become shorter: to touch what is gone would end the process."""
    left = os.fstat(file.fileno()).st_size
    if left < mapped:
        raise Damaged(f"Arrow file (it was cut from {mapped:,} to {left:,} bytes while it was read)")


def _places(path: Path, schema: Any, columns: tuple[str, ...]) -> list[_Place]:
    """Where the columns are; raises UserError for one that is not there, not the only one, or no text."""
    places = []
    for column in columns:
        present = list(schema.names)
        outer = outermost(column, present)
        require(
            outer is None or present.count(outer) == 1,
            f"{shown(path)} has several columns {outer!r}; leave one of them",
        )
        found = _place(schema, column)
        if found is None:
            raise UserError(
                f"{shown(path)} has no column {column!r} (its columns:"
                f" {names(_leaves(schema) if outer else present)}); name the right one in data.text_field"
                " (data=instructions: data.response_field, data.prompt_template)"
            )
        kind = schema.field(found[0])
        for name in found[1:]:
            kind = kind.type.field(name)
        require(
            _is_text(kind.type),
            f"{shown(path)}: column {column!r} holds {shown(str(kind.type))} and no text; make it a string,"
            " or name another with data.text_field=…",
        )
        places.append(found)
    return places


def _place(fields: Any, name: str) -> _Place | None:
    """The name of a field in a schema or a struct, or those of the fields around it, from the outside in."""
    import pyarrow as pa

    if fields.get_field_index(name) >= 0:
        return (name,)
    for outer, inner in splits(name):
        index = fields.get_field_index(outer)
        if index >= 0 and pa.types.is_struct(fields.field(index).type):
            found = _place(fields.field(index).type, inner)
            if found is not None:
                return (outer, *found)
    return None


def _leaves(fields: Any) -> list[str]:
    """The names of all fields, those inside of others as ``outer.inner``."""
    import pyarrow as pa

    found = []
    for field in fields:
        if pa.types.is_struct(field.type):
            found += [f"{field.name}.{inner}" for inner in _leaves(field.type)]
        else:
            found.append(field.name)
    return found


def _row(columns: tuple[str, ...], values: tuple[Any, ...], number: int) -> Row | BadRow:
    try:
        return {
            column: None if value is None else value.decode()
            for column, value in zip(columns, values, strict=True)
        }
    except UnicodeDecodeError:  # a writer's word that its strings are UTF-8 is not checked by Arrow
        return not_utf8(f"row {number + 1}")


def _texts(batch: Any, place: _Place, wanted: range) -> list[bytes | None]:
    """The bytes of a column in the wanted rows of a batch, with None for nulls."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array, valid = batch.column(place[0]), None
    for name in place[1:]:
        outer = array.is_valid()
        valid = outer if valid is None else pc.and_(valid, outer)
        array = array.field(name)
    array = _as_bytes(array.slice(wanted.start))
    array.validate(full=True)  # before what it points to is touched
    if valid is not None:
        array = pc.if_else(valid.slice(wanted.start), array, pa.scalar(None, array.type))
    if wanted.step > 1:
        array = array.take(pa.array(range(0, len(array), wanted.step), pa.int64()))
    return array.to_pylist()


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if isinstance(kind, pa.BaseExtensionType):
        return _is_text(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _is_text(kind.value_type)
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def _as_bytes(array: Any) -> Any:
    """Strings of every encoding as plain binary."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _as_bytes(array.storage)
    if pa.types.is_null(kind):
        return array.cast(pa.binary())
    if pa.types.is_large_string(kind):
        return array.view(pa.large_binary())
    if pa.types.is_string_view(kind):
        views = array.view(pa.binary_view())
        views.validate(full=True)  # before it is copied
        return views.cast(pa.large_binary())
    if pa.types.is_dictionary(kind):
        values = _as_bytes(array.dictionary)
        values.validate(full=True)
        encoded = pa.DictionaryArray.from_arrays(array.indices, values, safe=False)
        encoded.validate(full=True)
        return encoded.dictionary_decode()
    if pa.types.is_run_end_encoded(kind):
        array.validate(full=True)
        return _as_bytes(pc.run_end_decode(array))
    return array.view(pa.binary())
