"""One function from rows to blocks, with ggml's own quantizer and without."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from awq_hf.exporters.gguf import ggml
from awq_hf.exporters.gguf.blocks import ENCODERS
from awq_hf.exporters.gguf.ggml import quantize, types

ROWS = np.random.default_rng(0).standard_normal((5, 512)).astype(np.float32)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package with ggml in it were not installed."""
    monkeypatch.setattr(ggml, "PACKAGE", "no_such_package")
    ggml.library.cache_clear()
    yield
    ggml.library.cache_clear()


@pytest.mark.usefixtures("absent")
def test_without_ggml_what_users_need_most_is_written() -> None:
    assert ggml.library() is None and set(types()) == {*ENCODERS, Type.TQ1_0, Type.TQ2_0, Type.MXFP4}
    for kind in types():
        blocks = quantize(ROWS, kind)
        assert blocks.shape == gguf.quant_shape_to_byte_shape(ROWS.shape, kind) and gguf.dequantize(blocks, kind).shape == ROWS.shape
    with pytest.raises(ValueError, match=r"IQ2_S needs ggml's own quantizer: pip install .*, or choose one of Q4_0, .*Q6_K"):
        quantize(ROWS, Type.IQ2_S)


@pytest.mark.skipif(ggml.library() is None, reason="xllamacpp is not installed")
def test_with_ggml_the_rarer_types_are_written_too() -> None:
    importance = np.ones(512, np.float32)
    for kind in (Type.IQ2_XXS, Type.IQ3_XXS, Type.IQ3_S):  # the others take ggml many seconds to prepare for
        error = gguf.dequantize(quantize(ROWS, kind, importance), kind) - ROWS
        assert 0.05 < np.sqrt((error**2).mean()) < 0.75, kind
    for kind in (Type.TQ1_0, Type.TQ2_0, Type.MXFP4):
        assert np.array_equal(quantize(ROWS, kind), ggml.with_ggml(ROWS, kind, None)), kind
    with pytest.raises(ValueError, match="IQ2_XXS cannot be written without the importance of columns"):
        quantize(ROWS, Type.IQ2_XXS)


def test_the_shared_object_must_be_one_with_ggml_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without ggml's functions, or that is no shared object, counts as absent."""
    import _ctypes
    from pathlib import Path

    folder = Path(_ctypes.__file__).parent
    monkeypatch.setattr(ggml, "PACKAGE", "_ctypes")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(folder)]))
    ggml.library.cache_clear()
    assert any(folder.glob("_ctypes*.so")) and ggml.library() is None
    ggml.library.cache_clear()


def test_refused_before_work() -> None:
    with pytest.raises(
        ValueError, match="a row of 96 weights does not divide into Q4_K's blocks of 256; Q8_0 or another type with blocks of 32"
    ):
        quantize(ROWS[:, :96], Type.Q4_K)
    with pytest.raises(ValueError, match="a row of 40 weights does not divide into Q8_0's blocks of 32; F16 holds it"):
        quantize(ROWS[:, :40], Type.Q8_0)
    with pytest.raises(ValueError, match="F16 is not a type of blocks; choose one of Q4_0"):
        quantize(ROWS, Type.F16)
    for value in (np.nan, np.inf, -np.inf, -70000):
        rows = ROWS.copy()
        rows[3, 7] = value
        with pytest.raises(ValueError, match="not finite, or beyond 65504"):
            quantize(rows, Type.Q6_K)
    for importance in (np.ones(511), -np.ones(512), np.full(512, np.nan), np.ones((1, 512))):
        with pytest.raises(ValueError, match="importance must be 512 finite numbers"):
            quantize(ROWS, Type.Q6_K, importance)


def test_pieces_threads_and_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    importance = np.linspace(0, 1, 512)
    whole = quantize(ROWS, Type.Q4_K, importance)
    monkeypatch.setattr(ggml, "WEIGHTS", 1)  # row by row
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert np.array_equal(quantize(np.asfortranarray(ROWS), Type.Q4_K, importance), whole)
    assert quantize(ROWS[:0], Type.Q4_K).shape == (0, 288)
