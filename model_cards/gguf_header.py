"""What a GGUF file says of itself and which tensors it lists, but not its vocabulary.

gguf's own reader takes tens of seconds for one of 150,000 tokens.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of values, by GGUFValueType
_UINT32, _STRING, _ARRAY = 4, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    name: str
    kind: GGMLQuantizationType
    weights: int

    @property
    def nbytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.weights // block * size


@dataclass(frozen=True)
class GgufHeader:
    """description: general.description, how the file was made, or None; file_type: general.file_type, LlamaFileType's number, or None."""

    tensors: list[GgufTensor]
    description: str | None
    file_type: int | None = None


def read_header(path: Path) -> GgufHeader:
    """Raises ValueError for what is no GGUF file of version 2 or 3, or breaks off."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise ValueError("it does not begin with GGUF")
            return _Reader(data).header()
    except (struct.error, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as GGUF ({error}); is it whole?") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 4

    def header(self) -> GgufHeader:
        version, count, pairs = self._take("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        description = file_type = None
        for _ in range(pairs):
            key, (kind,) = self._string(), self._take("<I")
            if key == b"general.description" and kind == _STRING:
                description = self._string().decode(errors="replace")
            elif key == b"general.file_type" and kind == _UINT32:
                (file_type,) = self._take("<I")
            else:
                self._skip(kind)
        return GgufHeader([self._tensor() for _ in range(count)], description, file_type)

    def _tensor(self) -> GgufTensor:
        name = self._string().decode(errors="replace")
        (dimensions,) = self._take("<I")
        shape = self._take(f"<{dimensions}Q")
        kind, _ = self._take("<IQ")
        return GgufTensor(name, GGMLQuantizationType(kind), math.prod(shape))

    def _take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return values

    def _string(self) -> bytes:
        (length,) = self._take("<Q")
        self.place += length
        return self.data[self.place - length : self.place]

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            of, count = self._take("<IQ")
            if of in _SIZES:
                self.place += count * _SIZES[of]
            else:
                for _ in range(count):
                    self._skip(of)
        elif kind in _SIZES:
            self.place += _SIZES[kind]
        else:
            raise ValueError(f"value type {kind} is not known")
