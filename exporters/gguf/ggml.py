"""Float rows to blocks: by the encoders of `blocks`, which give ggml's bytes; others by ggml itself, where it is installed.

The encoders come first because they give the same bytes everywhere: ggml's own are compiled with fused multiply-add on some machines, which
moves a code here and there. They are about as fast.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from awq_hf.exporters.gguf.blocks import ENCODERS
from awq_hf.exporters.gguf.blocks.legacy import Bytes
from awq_hf.exporters.gguf.blocks.search import Floats

PACKAGE = "xllamacpp"  # on PyPI: llama.cpp in one shared object, which exports ggml's functions
WEIGHTS = 2**17  # encoded at once: what an encoder holds at a time fits a core's cache
LARGEST = 65504  # of float16, which scales and minimums are stored in

IN_GGUF = (Type.TQ1_0, Type.TQ2_0, Type.MXFP4)  # encoded by the gguf package
IN_GGML = (Type.IQ1_S, Type.IQ1_M, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S)

Encoder = Callable[[Floats, Floats | None], Bytes]


@cache
def library() -> ctypes.CDLL | None:
    """The shared object with ggml_quantize_chunk, or None. The package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob(f"{PACKAGE}*")):
            if path.suffix not in (".so", ".pyd", ".dylib"):
                continue
            try:
                found = ctypes.CDLL(str(path))
                found.ggml_quantize_chunk.restype = found.ggml_row_size.restype = ctypes.c_size_t
                found.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
            except (OSError, AttributeError):  # not for this machine, or without these functions
                continue
            found.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
            found.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
            return found
    return None


def types() -> list[Type]:
    """The block types that `quantize` writes here and now."""
    return [*ENCODERS, *IN_GGUF, *(IN_GGML if library() else ())]


def row_bytes(kind: Type, k: int) -> int:
    """Bytes of a row of k weights. Raises ValueError where blocks do not divide it."""
    width, size = gguf.GGML_QUANT_SIZES[kind]
    if k % width:
        other = "Q8_0 or another type with blocks of 32" if k % 32 == 0 else "F16"
        raise ValueError(f"a row of {k} weights does not divide into {kind.name}'s blocks of {width}; {other} holds it")
    return k // width * size


def with_ggml(rows: Floats, kind: Type, importance: Floats | None) -> Bytes:
    """ggml's blocks. rows: float32 [n, k], contiguous; importance: float32 [k]. The library must be there."""
    ggml, (n, k) = library(), rows.shape
    assert ggml is not None
    out = np.empty((n, row_bytes(kind, k)), np.uint8)
    if ggml.ggml_row_size(kind, k) != out.shape[1]:
        raise ValueError(f"{PACKAGE} and gguf disagree on the size of {kind.name}; install versions of the same time")
    ggml.ggml_quantize_chunk(kind, rows.ctypes.data, out.ctypes.data, 0, n, k, None if importance is None else importance.ctypes.data)
    return out


def _encoder(kind: Type, importance: Floats | None) -> Encoder:
    if kind in ENCODERS:
        return ENCODERS[kind]
    if kind in IN_GGUF:
        return lambda rows, _: gguf.quants.quantize(rows, kind)
    names = ", ".join(t.name for t in types())
    if kind not in IN_GGML:
        raise ValueError(f"{kind.name} is not a type of blocks; choose one of {names}")
    if (ggml := library()) is None:
        raise ValueError(f"{kind.name} needs ggml's own quantizer: pip install {PACKAGE}, or choose one of {names}")
    if importance is None and ggml.ggml_quantize_requires_imatrix(kind):
        raise ValueError(f"{kind.name} cannot be written without the importance of columns: calibrate, or choose one of {names}")
    return lambda rows, importance: with_ggml(rows, kind, importance)


def quantize(rows: Floats, kind: Type, importance: NDArray[np.floating[Any]] | None = None) -> Bytes:
    """Blocks of `kind` nearest to `rows`, on as many threads as torch uses: uint8 [n, bytes].

    rows: float32 [n, k]. importance: float32 [k], not negative: how much errors in each column matter (llama.cpp's importance matrix: the
    mean square of the inputs); its scale does not matter. Q8_0 and the ternary types do not use it. Raises ValueError for rows that blocks
    do not divide or hold, and for a type that needs more than what is installed or given.
    """
    n, k = rows.shape
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        if importance.shape != (k,) or not ((importance >= 0) & np.isfinite(importance)).all():
            raise ValueError(f"importance must be {k} finite numbers that are not negative; it has shape {list(importance.shape)}")
    encode, size = _encoder(kind, importance), row_bytes(kind, k)
    if rows.size and not max(rows.max(), -rows.min()) <= LARGEST:
        raise ValueError(f"a weight is not finite, or beyond {LARGEST}, which {kind.name}'s float16 scales do not reach; use F32 here")
    return by_rows(lambda part: encode(np.ascontiguousarray(rows[part], np.float32), importance), n, k, size)


def by_rows(encode: Callable[[slice], Bytes], n: int, k: int, size: int) -> Bytes:
    """encode(slice) of n rows of k weights, in pieces that fit a core's cache, on as many threads as torch uses: uint8 [n, size]."""
    out = np.empty((n, size), np.uint8)
    step = max(1, WEIGHTS // k)

    def fill(start: int) -> None:
        part = slice(start, start + step)
        with np.errstate(all="ignore"):  # holds for one thread; empty sub-blocks divide zero by zero, as in ggml
            out[part] = encode(part)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, n, step)))
    return out
