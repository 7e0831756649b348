"""Rows of JSON as Parquet tables and back again, without a changed value.

A column has the type of its values: int64, float64, string, bool or a list of floats. Values of any
other type (options, events, lists without a number) are JSON text. A list has float32 if seven
significant digits give back each of its values, which is so for recorded singular values.
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

KEY = b"lowrank_lab"  # in a table's metadata: its columns of JSON text, and those a row may lack


def without_nulls(row: Row) -> Row:
    """What tells two rows apart: a value that is null says no more than one that is missing."""
    return {name: value for name, value in row.items() if value is not None}


def encode(rows: Sequence[Row]) -> pa.Table:
    """Rows as a typed table, in their order; the columns in that in which they are met.

    Raises:
        ValueError: the table would not give back the same rows.
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
        nullable = pa.types.is_integer(kind) and None in values  # or pandas would read floats
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
    """The rows that a table was made from; of a column that some row lacked, only its values."""
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
    """A table as the content of a Parquet file, compressed."""
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
    """The table of a Parquet file.

    Raises:
        ValueError: it is no such file.
    """
    return pq.read_table(path)


def _type_of(values: Sequence[Any]) -> pa.DataType | None:
    """The type that all values have; None if only JSON can say them."""
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
    """The float64 that each float32 is written as with seven significant digits."""
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
    """Whether its values are floats that seldom repeat: bytes by place compress better then."""
    is_list = pa.types.is_list(column.type)
    if not pa.types.is_floating(column.type.value_type if is_list else column.type):
        return False
    return is_list or bool(2 * pc.count_distinct(column).as_py() > len(column))
