"""How long quantizing takes, and where the time goes (loading and saving apart).

python -m benchmarks.speed            the demonstration model, 64 x 256 tokens
python -m benchmarks.speed --large    also two blocks of a random Llama of 1B shape (hidden 2048, 32/8 heads, MLP 8192), 16 x 256 tokens
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import awq_hf
from benchmarks.common import Subject, publish, quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    quiet()
    subject = Subject.packaged()
    subject.load(subject.config())  # the first run also pays for torch's own start-up
    rows = [_row("demo-llama, 64 x 256 tokens", subject.load(subject.config()))]
    if options.large:
        rows.append(_row("2 blocks of 1B shape, 16 x 256 tokens", _two_large_blocks()))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    publish("speed", "seconds of quantizing", [{key: row.get(key, "") for key in keys} for row in rows])


def _two_large_blocks() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = [torch.randint(4096, (256,)) for _ in range(16)]
    return awq_hf.quantize(model, awq_hf.AwqConfig(calibration=tokens, samples=16, seq_len=256))


def _row(name: str, model: Any) -> dict[str, Any]:
    report = model.awq_report
    weights = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    return {"model": name, "weights": weights, **report.seconds}


if __name__ == "__main__":
    main()
