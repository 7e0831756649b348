"""Lossless conversion between JSON rows and Parquet tables.

Columns have the type of their values: int64, float64, string, bool or list of floats. Values of any
other type (options, events, lists without numbers) are stored as JSON text. Lists are float32 if
seven significant digits restore every value, as they do for recorded singular values.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lowrank_lab.runs.files import Row

KEY = b"lowrank_lab"  # table metadata: names of JSON text columns, and of optional columns


def without_nulls(row: Row) -> Row:
    """The row without null values: null and missing values are equivalent."""
    return {name: value for name, value in row.items() if value is not None}


def encode(rows: Sequence[Row]) -> pa.Table:
    """Rows as a typed table; columns are in order of first appearance.

    Raises:
        ValueError: decoding the table would not restore the same rows.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, fields, as_json = {}, [], []
    for name in names:
        values = [row.get(name) for row in rows]
        kind = _type_of([value for value in values if value is not None])
        if kind is None:
            as_json.append(name)
            values = [None if value is None else json.dumps(value) for value in values]
            kind = pa.string()
        nullable = pa.types.is_integer(kind) and None in values  # else pandas converts to float
        columns[name] = pd.Series(values, dtype="Int64" if nullable else "object")
        fields.append(pa.field(name, kind))
    lacking = [name for name in names if any(name not in row for row in rows)]
    table = pa.Table.from_pandas(pd.DataFrame(columns), pa.schema(fields), preserve_index=False)
    own = {KEY: json.dumps({"json": as_json, "optional": lacking}).encode()}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **own})
    if list(map(without_nulls, decode(table))) != list(map(without_nulls, rows)):
        raise ValueError("the table would not give back the same rows")
    return table


def decode(table: pa.Table) -> list[Row]:
    """The rows of an encoded table; null values of optional columns are omitted."""
    own = json.loads((table.schema.metadata or {}).get(KEY, b'{"json": [], "optional": []}'))
    columns = []
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in own["json"]:
            values = [None if text is None else json.loads(text) for text in column.to_pylist()]
        else:
            values = _lists(column) if pa.types.is_list(column.type) else column.to_pylist()
        columns.append((name, values, name in own["optional"]))
    return [
        {n: values[i] for n, values, optional in columns if values[i] is not None or not optional}
        for i in range(table.num_rows)
    ]


def to_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a compressed Parquet file."""
    measured = [field.name for field in table.schema if _is_measured(table[field.name])]
    leaves = {
        f"{name}.list.element" if pa.types.is_list(table.schema.field(name).type) else name
        for name in measured
    }
    others = [name for name in table.column_names if name not in measured]
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, compression="zstd", compression_level=19, use_dictionary=others,
        write_statistics=False,
        column_encoding=dict.fromkeys(leaves, "BYTE_STREAM_SPLIT"),
    )  # fmt: skip
    return buffer.getvalue()


def read(path: Path) -> pa.Table:
    """Read the table of a Parquet file.

    Raises:
        ValueError: the file is not a Parquet file.
    """
    return pq.read_table(path)


def _type_of(values: Sequence[Any]) -> pa.DataType | None:
    """The common type of the values; None if they must be stored as JSON text."""
    kinds = {type(value) for value in values}
    if not kinds:
        return pa.null()
    for kind, found in ((bool, pa.bool_()), (int, pa.int64()), (str, pa.string())):
        if kinds == {kind}:
            return found
    if kinds <= {int, float}:
        return pa.float64()
    if kinds != {list}:
        return None
    inner = [number for value in values for number in value if number is not None]
    if not inner or not {type(number) for number in inner} <= {int, float}:
        return None
    exact = np.array(inner, dtype=float)
    with np.errstate(over="ignore"):
        short = exact.astype(np.float32)
    return pa.list_(pa.float32() if (_seven_digits(short) == exact).all() else pa.float64())


def _seven_digits(values: np.ndarray) -> np.ndarray:
    """Each float32 rounded to seven significant digits, as float64."""
    return np.char.mod("%.7g", values).astype(float) if len(values) else values.astype(float)


def _lists(column: pa.ListArray) -> list[list[float | None] | None]:
    flat = column.flatten()
    numbers = flat.to_numpy(zero_copy_only=False)
    exact: list[float | None] = (
        _seven_digits(numbers) if pa.types.is_float32(flat.type) else numbers
    ).tolist()
    if flat.null_count:
        there = flat.is_valid().to_pylist()
        exact = [x if valid else None for x, valid in zip(exact, there, strict=True)]
    found: list[list[float | None] | None] = []
    begin = 0
    for length in pc.list_value_length(column).to_pylist():
        found.append(None if length is None else exact[begin : begin + length])
        begin += length or 0
    return found


def _is_measured(column: pa.ChunkedArray) -> bool:
    """Whether the values are mostly distinct floats, which byte-stream split compresses better."""
    is_list = pa.types.is_list(column.type)
    if not pa.types.is_floating(column.type.value_type if is_list else column.type):
        return False
    return is_list or bool(2 * pc.count_distinct(column).as_py() > len(column))
