"""Tables of `datasets` as images that are read row by row and not decoded, so that a damaged file is an error of its own."""

import copy
from collections.abc import Iterator, Sized
from typing import Any


class ColumnOfImages:
    """
    A column of a table of `datasets`, read row by row and not decoded: each item is a row `{"image": …}`.

    Args:
        table: the table, with the column alone.
        name: of the column.
    """

    def __init__(self, table: Any, name: str):
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.table[index][self.name]}


class StreamedColumn:
    """[`ColumnOfImages`] of a streamed table."""

    def __init__(self, table: Any, name: str):
        self.table, self.name = table, name

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"image": row[self.name]} for row in self.table)


def rows_of_images(inputs: Any) -> Any:
    """The rows of a table of `datasets`, or of a column of one (`dataset["photo"]`), not decoded; anything else as it is."""
    name: Any = getattr(inputs, "column_name", None)
    table: Any = getattr(inputs, "source", None)
    if isinstance(name, str) and hasattr(table, "select_columns"):  # `dataset["photo"]` of datasets 4 and later
        table = undecoded(table.select_columns([name]), name)
        return ColumnOfImages(table, name) if isinstance(table, Sized) else StreamedColumn(table, name)
    return undecoded(inputs, "image") if hasattr(inputs, "cast_column") else inputs


def undecoded(table: Any, name: str) -> Any:
    """
    A table of `datasets` whose column of images gives bytes or paths: we decode image by image, so that a damaged file does
    not end the iteration.
    """
    if (getattr(table, "format", None) or {}).get("type") == "custom":
        return table  # `with_transform`: the user's function expects decoded images
    column: Any = (getattr(table, "features", None) or {}).get(name)
    if not getattr(column, "decode", None) or not hasattr(table, "cast_column"):
        return table
    column = copy.copy(column)
    column.decode = False
    return table.cast_column(name, column)
