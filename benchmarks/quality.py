"""KL to the float model as a share of plain rounding's, on text that calibration never saw.

    python -m benchmarks.quality                                     the demonstration model
    python -m benchmarks.quality --model DIR --text FILE --group-size 32   another one (first 100,000 tokens calibrate, the rest evaluate)

--sweep tries every bit width, every group size that divides the model, symmetric and asymmetric. It computes in float32: at 8 bits
the rounding of a bfloat16 model's own activations costs more than the quantization of its weights, and would hide it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from awq_hf.blocks import matrices_of
from awq_hf.matrices import shape_of
from awq_hf.spec import BITS, GROUP_SIZES
from benchmarks.common import Subject, publish, quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    quiet()
    subject = Subject.from_directory(options.model, options.text) if options.model else Subject.packaged()
    original = subject.load()
    cases = [(4, options.group_size, False), (3, options.group_size, False), (2, min(64, options.group_size), False)]
    max_tokens = 40_000
    if options.sweep:
        subject.dtype, max_tokens = "float32", 10_000
        original = subject.load()
        widths = {shape_of(module)[1] for module in matrices_of(original.get_decoder()).values()}
        sizes = [g for g in GROUP_SIZES if g == -1 or all(width % g == 0 for width in widths)]
        cases = [(bits, size, symmetric) for bits in BITS for size in sizes for symmetric in (False, True)]
    rows = [compare(subject, original, max_tokens, *case) for case in cases]
    kind = "sweep" if options.sweep else "quality"
    publish(f"{kind}_{subject.name}", f"{subject.name}: KL as a share of plain rounding's, 64 x 256 calibration tokens", rows)


def compare(subject: Subject, original: Any, max_tokens: int, bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    options: dict[str, Any] = dict(bits=bits, group_size=group_size, zero_point=not symmetric)
    plain = subject.measure(subject.load(subject.config(plain=True, **options)), original, max_tokens)
    model = subject.load(subject.config(**options))
    ours = subject.measure(model, original, max_tokens)
    assert plain.kl is not None and ours.kl is not None
    return {
        "bits": bits,
        "group size": group_size,
        "symmetric": symmetric,
        "share": ours.kl / plain.kl,
        "KL": ours.kl,
        "KL plain": plain.kl,
        "top-1": ours.top1,
        "top-1 plain": plain.top1,
        "perplexity": ours.perplexity,
        "perplexity plain": plain.perplexity,
        "perplexity float": ours.reference_perplexity,
        "layers worse than plain": sum(layer.loss > layer.loss_plain for layer in model.awq_report.layers),
        "evaluation tokens": ours.tokens,
    }


if __name__ == "__main__":
    main()
