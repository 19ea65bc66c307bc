"""Blocks against ggml's own quantizer: its bytes, recorded as digests, and itself where it is installed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from awq_hf.exporters.gguf import ggml
from awq_hf.exporters.gguf.blocks import ENCODERS, k_affine
from awq_hf.exporters.gguf.blocks.legacy import Bytes
from awq_hf.exporters.gguf.blocks.search import Floats, nearest, ordered_sum

K = 512
DIGESTS = Path(__file__).with_name("ggml_digests.json")  # of ggml 0.26 on x86-64, written by this file when run as a program


def uniform(*shape: int, seed: int = 0) -> Floats:
    """Numbers in (0, 1) by integer arithmetic alone, so that digests of what is made from them hold everywhere."""
    x = np.arange(1, np.prod(shape) + 1, dtype=np.uint64) + np.uint64(seed << 32)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x >> np.uint64(41)).astype(np.float32) + np.float32(0.5)).reshape(shape) / np.float32(2**23)


def inputs() -> dict[str, Floats]:
    """Rows float32 [n, K], each kind with its own trouble."""
    bell = sum((uniform(16, K, seed=s) for s in range(1, 12)), uniform(16, K)) - np.float32(6)
    heavy = bell * bell * bell / uniform(16, K, seed=20)
    powers = np.ldexp(np.float32(1), ((uniform(16, K // 16, seed=21) - np.float32(0.5)) * 60).astype(int)).repeat(16, axis=1)
    sparse = bell * (uniform(16, K, seed=22) < 0.03)  # with zeros of both signs, and sub-blocks of zeros
    return {
        "bell": bell / np.float32(50),
        "heavy": heavy,
        "sparse": sparse,
        "zero": np.zeros((1, K), np.float32),
        "constant": np.repeat(bell[:, :1], K, axis=1),
        "positive": np.abs(bell) + np.float32(1),
        "negative": -np.abs(bell) - np.float32(1),
        "offset": bell / np.float32(1000) + np.float32(300),
        "halves": np.where(np.arange(K) % 32 == 0, 127, np.float32(0.49999997) + (np.arange(K) % 5)).astype(np.float32)[None],
        "grid": np.rint(bell * 3) / np.float32(16),  # ties
        "scales": bell * powers,
        "denormal": bell * np.float32(1e-30) * np.float32(1e-10),
        "almost denormal": bell * np.float32(1e-37),
        "large": bell * np.float32(9000),
        "huge": bell * np.float32(1e9),
        "one block": heavy[3:4, :256].copy(),
    }


def importances(k: int) -> dict[str, Floats | None]:
    spread = uniform(k, seed=30)
    return {
        "none": None,
        "ones": np.ones(k, np.float32),
        "spread": spread * spread * spread / (np.float32(1.001) - spread),
        "holes": spread * (uniform(k, seed=31) < 0.3),
        "zeros": np.zeros(k, np.float32),
    }


def cases() -> Iterator[tuple[str, Floats, Floats | None]]:
    for name, rows in inputs().items():
        for kind, importance in importances(rows.shape[1]).items():
            yield f"{name}, {kind}", rows, importance


def own(kind: Type, rows: Floats, importance: Floats | None) -> Bytes:
    with np.errstate(all="ignore"):
        return ENCODERS[kind](rows, importance)


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_bytes_are_those_that_ggml_wrote(kind: Type) -> None:
    recorded = json.loads(DIGESTS.read_text())[kind.name]
    found = {name: hashlib.sha256(own(kind, rows, importance).tobytes()).hexdigest()[:16] for name, rows, importance in cases()}
    assert [name for name in found if found[name] != recorded[name]] == []


@pytest.mark.skipif(ggml.library() is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_bytes_are_those_that_ggml_writes(kind: Type) -> None:
    for name, rows, importance in cases():
        assert np.array_equal(own(kind, rows, importance), ggml.with_ggml(rows, kind, importance)), name
    for seed in range(40, 60):  # what is rare: importance that is nearly all zero leaves scales to rounding errors
        rows = np.tan((uniform(16, K, seed=seed) - np.float32(0.5)) * np.float32(3.1415))
        importance = uniform(K, seed=seed + 100) * (uniform(K, seed=seed + 200) < 0.2)
        assert np.array_equal(own(kind, rows, importance), ggml.with_ggml(rows, kind, importance)), seed


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_decoded_blocks_are_near_what_was_encoded(kind: Type) -> None:
    rows = inputs()["bell"]
    error = gguf.dequantize(ggml.quantize(rows, kind), kind) - rows
    bits = int(re.sub(r"\D*(\d).*", r"\1", kind.name))
    assert 0 < np.sqrt((error**2).mean() / (rows**2).mean()) < 1.5 * 2.0**-bits


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_K, Type.Q6_K, Type.IQ4_XS], ids=lambda kind: kind.name)
def test_importance_moves_the_error_to_where_it_does_not_matter(kind: Type) -> None:
    rows, importance = inputs()["bell"], np.where(np.arange(K) % 8 == 0, np.float32(100), np.float32(1))
    plain, weighted = (gguf.dequantize(ggml.quantize(rows, kind, i), kind) - rows for i in (None, importance))
    assert (importance * weighted**2).mean() < 0.8 * (importance * plain**2).mean()


def test_sums_run_in_order_for_any_number_of_columns() -> None:
    for n in (1, 2, 3, 17):
        for seed in range(10):
            x = uniform(300, n, seed=seed)
            assert np.array_equal(ordered_sum(x), np.add.accumulate(x, axis=0)[-1])


def test_nearest_rounds_halves_to_even_and_wraps_as_ggml_does() -> None:
    x = np.array([0.5, 1.5, -2.5, 2.4999998, 4194303, np.inf, -np.inf, np.nan], np.float32)
    assert nearest(x).tolist() == [0, 2, -2, 2, 4194303, -0x400000, -0x400000, 0]


def test_six_bits_come_back() -> None:
    scales, minimums = ((uniform(64, 8, seed=s) * 64).astype(np.uint8) for s in (0, 1))
    back = k_affine.split_six_bits(k_affine.six_bits(scales, minimums))
    assert np.array_equal(back[0], scales) and np.array_equal(back[1], minimums)


def write_digests() -> None:
    found = {
        kind.name: {
            name: hashlib.sha256(ggml.with_ggml(rows, kind, importance).tobytes()).hexdigest()[:16] for name, rows, importance in cases()
        }
        for kind in ENCODERS
    }
    DIGESTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    write_digests()
