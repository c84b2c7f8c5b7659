"""Parquet and Arrow files -> rows of the columns that hold text, some rows at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rsotrain.data.decompression import compression
from rsotrain.data.finding import shown
from rsotrain.data.rows import BadRow, Damaged, Row, names, not_utf8, outermost, reason, splits
from rsotrain.errors import UserError, require

BATCH_ROWS = 256  # bounds memory: documents may be whole books
ARROW_FILE = b"ARROW1"


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
        for batch in (
            _parquet_batches(path, columns) if suffix == ".parquet" else _arrow_batches(path, columns)
        ):
            offset = max(first - number, (first - number) % step)
            if offset < batch.num_rows:
                places = range(offset, batch.num_rows, step)
                texts = [_texts(path, batch, column, places) for column in columns]
                for place, values in zip(places, zip(*texts, strict=True), strict=True):
                    yield number + place, _row(columns, values, number + place)
            number += batch.num_rows
    except UserError:
        raise
    except (pa.ArrowException, ValueError, LookupError, TypeError, OverflowError) as error:
        raise Damaged(f"{kind} ({reason(error)})") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise Damaged(f"{kind} ({reason(error)})") from error  # Arrow's word for what makes no sense, too


def _parquet_batches(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        yield from file.iter_batches(BATCH_ROWS, columns=list(columns))


def _arrow_batches(path: Path, columns: tuple[str, ...]) -> Iterator[Any]:
    import pyarrow as pa

    with path.open("rb") as file:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    with pa.memory_map(str(path)) as source:
        opened = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        outer = _check_columns(path, columns, opened.schema.names)
        batches = (opened.get_batch(i) for i in range(opened.num_record_batches)) if is_file else opened
        for batch in batches:
            batch.validate()  # its lengths; what lies inside is checked where it is used
            selected = batch.select(outer)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield selected.slice(start, BATCH_ROWS)


def _check_columns(path: Path, columns: tuple[str, ...], present: list[str]) -> list[str]:
    """The columns of the table that hold the wanted ones."""
    found = [outermost(column, present) for column in columns]
    for column, outer in zip(columns, found, strict=True):
        if outer is None:
            raise _no_column(path, column, present)
        require(present.count(outer) == 1, f"{shown(path)} has several columns {outer!r}; leave one of them")
    return list(dict.fromkeys(outer for outer in found if outer is not None))


def _no_column(path: Path, column: str, present: list[str]) -> UserError:
    return UserError(
        f"{shown(path)} has no column {column!r} (its columns: {names(present)}); name the right one in"
        " data.text_field (data=instructions: data.response_field, data.prompt_template)"
    )


def _row(columns: tuple[str, ...], values: tuple[Any, ...], number: int) -> Row | BadRow:
    try:
        return {
            column: None if value is None else value.decode()
            for column, value in zip(columns, values, strict=True)
        }
    except UnicodeDecodeError:  # a writer's word that its strings are UTF-8 is not checked by Arrow
        return not_utf8(f"row {number + 1}")


def _texts(path: Path, batch: Any, column: str, places: range) -> list[bytes | None]:
    """The bytes of a column at some places, with None for nulls."""
    import pyarrow as pa

    array = _inside(batch, column)
    if array is None:
        raise _no_column(path, column, _leaves(batch.schema))
    array = _as_bytes(array.slice(places.start))
    if array is None:
        kind = _inside(batch, column).type
        raise UserError(
            f"{shown(path)}: the column {column!r} holds {shown(str(kind))} and no text; make it a string, or"
            " name another with data.text_field=…"
        )
    array.validate(full=True)  # before what it points to is touched
    if places.step > 1:
        array = array.take(pa.array(range(0, len(array), places.step), pa.int64()))
    return array.to_pylist()


def _inside(table: Any, name: str) -> Any:
    """The array of a field in a record batch or an array of structs; None where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    is_batch = isinstance(table, pa.RecordBatch)
    fields = table.schema if is_batch else table.type
    if not is_batch and not pa.types.is_struct(fields):
        return None

    def child(field: str) -> Any:
        index = fields.get_field_index(field)
        if index < 0:
            return None
        return table.column(index) if is_batch else pc.struct_field(table, [index])

    if (found := child(name)) is not None:
        return found
    for outer, inner in splits(name):
        if (parent := child(outer)) is not None and (found := _inside(parent, inner)) is not None:
            return found
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


def _as_bytes(array: Any) -> Any:
    """Strings of every encoding as plain binary; None where there is no text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _as_bytes(array.storage)
    if pa.types.is_null(kind):
        return array.cast(pa.binary())
    if pa.types.is_string(kind):
        return array.view(pa.binary())
    if pa.types.is_large_string(kind):
        return array.view(pa.large_binary())
    if pa.types.is_string_view(kind):
        views = array.view(pa.binary_view())
        views.validate(full=True)  # before it is copied
        return views.cast(pa.large_binary())
    if pa.types.is_dictionary(kind):
        values = _as_bytes(array.dictionary)
        if values is None:
            return None
        values.validate(full=True)
        indices = array.indices
        encoded = pa.DictionaryArray.from_arrays(indices, values, safe=False)
        encoded.validate(full=True)
        return encoded.dictionary_decode()
    if pa.types.is_run_end_encoded(kind):
        array.validate(full=False)
        return _as_bytes(pc.run_end_decode(array))
    return None
