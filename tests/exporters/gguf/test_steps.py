"""Steps and codes against the gguf package's reading of the same bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from awq_hf.exporters.gguf.blocks.steps import KINDS, steps_of, with_codes
from awq_hf.exporters.gguf.ggml import quantize

NAMES = [kind.name for kind in KINDS]


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_codes_are_what_a_reader_sees(name: str) -> None:
    kind, generator = Type[name], np.random.default_rng(0)
    rows = (generator.standard_normal((3, 512)) * np.exp(generator.standard_normal((3, 512)))).astype(np.float32)
    rows[1, :64] = 0
    encoded = quantize(rows, kind, np.ones(512, np.float32))
    steps, offsets, top = steps_of(encoded, kind)
    assert steps.shape == offsets.shape == (3, 512 // KINDS[kind].width)
    codes = generator.integers(0, top + 1, rows.shape, dtype=np.uint8)
    spread = lambda values: np.repeat(values, KINDS[kind].width, axis=1)  # noqa: E731
    expected = spread(steps) * codes - spread(offsets)
    found = gguf.dequantize(with_codes(encoded, kind, codes), kind)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert np.abs(found).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_codes_that_were_there_give_the_same_bytes(name: str) -> None:
    kind = Type[name]
    rows = np.random.default_rng(1).standard_normal((2, 256)).astype(np.float32)
    encoded = quantize(rows, kind)
    steps, offsets, top = (np.repeat(v, KINDS[kind].width, axis=1) if isinstance(v, np.ndarray) else v for v in steps_of(encoded, kind))
    codes = np.rint((gguf.dequantize(encoded, kind) + offsets) / np.where(steps == 0, 1, steps)).astype(np.uint8)
    assert codes.max() <= top
    assert (with_codes(encoded, kind, codes) == encoded).all()
