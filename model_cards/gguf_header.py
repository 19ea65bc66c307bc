"""What a GGUF file says of itself and which tensors it lists, but not its vocabulary, of which one token or two are looked up.

gguf's own reader takes tens of seconds for one of 150,000 tokens.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from awq_hf.model_cards.chat import Template

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of values, by GGUFValueType
_UINT32, _STRING, _ARRAY = 4, 8, 9
_SPECIAL = {b"tokenizer.ggml.bos_token_id": "bos_token", b"tokenizer.ggml.eos_token_id": "eos_token"}
_TEXTS, _NUMBERS = (b"general.description", b"tokenizer.chat_template"), (b"general.file_type", *_SPECIAL)


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
    """description: general.description, how the file was made, or None; file_type: general.file_type, LlamaFileType's number, or None.
    chat_template: with the tokens that begin and end a text, or None."""

    tensors: list[GgufTensor]
    description: str | None
    file_type: int | None = None
    chat_template: Template | None = None


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
        found: dict[bytes, Any] = {}
        tokens = None  # where they are: one or two of them are wanted, when the numbers are known
        for _ in range(pairs):
            key, (kind,) = self._string(), self._take("<I")
            if key in _TEXTS and kind == _STRING:
                found[key] = self._string().decode(errors="replace")
            elif key in _NUMBERS and kind == _UINT32:
                (found[key],) = self._take("<I")
            else:
                tokens = self.place if key == b"tokenizer.ggml.tokens" else tokens
                self._skip(kind)
        tensors = [self._tensor() for _ in range(count)]
        template = found.get(b"tokenizer.chat_template")
        special = {name: self._token(tokens, found[key]) for key, name in _SPECIAL.items() if tokens is not None and key in found}
        return GgufHeader(
            tensors,
            found.get(b"general.description"),
            found.get(b"general.file_type"),
            Template(template, special) if template else None,
        )

    def _token(self, place: int, number: int) -> str:
        """One of the array of strings that begins there."""
        self.place = place
        _, count = self._take("<IQ")
        if number >= count:
            raise ValueError(f"token {number} is none of its {count}")
        for _ in range(number):
            self._string()
        return self._string().decode(errors="replace")

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
