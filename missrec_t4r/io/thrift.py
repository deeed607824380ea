"""Reader of Thrift's compact protocol, in which parquet describes itself, to inspect a file before Arrow opens it.

Arrow follows the nesting of a schema by recursion: a file of 140 kilobytes with twenty thousand nested groups ends the
process. This reader has a limit for depth and for the number of values, and allocates nothing that a file claims.
"""

from __future__ import annotations

from typing import Any

Struct = dict[int, Any]
"""Field number -> value: int, bool, bytes, list, or another struct. Unknown fields are kept."""

_MOST_DEPTH = 16
_DOUBLE, _BINARY, _LISTS, _STRUCT = 7, 8, (9, 10), 12


class CompactReader:
    """Values of a byte string, one after the other.

    Parameters
    ----------
    content : bytes
    most_values : int
        Numbers, strings, list elements and structs that are read at most.
    """

    def __init__(self, content: bytes, most_values: int) -> None:
        self.content, self.position, self._left = content, 0, most_values

    def struct(self, depth: int = 0) -> Struct:
        """Read a struct.

        Raises
        ------
        ValueError
            The bytes are no struct, or exceed a limit.
        """
        if depth > _MOST_DEPTH:
            raise ValueError(f"structs nested more than {_MOST_DEPTH} deep")
        fields: Struct = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._zigzag()
            fields[number] = (kind & 15 == 1) if kind & 15 in (1, 2) else self._value(kind & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError("more values than any file of ours has")
        if kind in (1, 2, 3):  # a boolean in a list, or a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == _DOUBLE:
            return self._bytes(8)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind not in _LISTS or depth > _MOST_DEPTH:  # parquet has no maps
            raise ValueError(f"a value of type {kind}")
        head = self._byte()
        length = head >> 4 if head >> 4 < 15 else self._varint()
        return [self._value(head & 15, depth + 1) for _ in range(length)]

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, length: int) -> bytes:
        end = self.position + length
        if end > len(self.content):
            raise ValueError("it ends in the middle")
        part = self.content[self.position : end]
        self.position = end
        return part

    def _varint(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number of more than 64 bits")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
