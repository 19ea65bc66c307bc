"""awq-hf itself, and plain rounding, measured like the others."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from awq_hf import AwqConfig, quantize
from benchmarks.peer_drivers.driver import Job


def main() -> None:
    job = Job.read()
    windows = list(job.tokens)
    kind = AwqConfig.plain_rounding if job.method == "plain" else AwqConfig
    config = kind(
        bits=job.bits,
        group_size=job.group_size,
        calibration=windows,
        samples=len(windows),
        seq_len=len(windows[0]),
    )
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    with job.measured("awq-hf"):
        model = quantize(model, config)
    model.save_pretrained(job.checkpoint)
    job.keep_logits(model)


if __name__ == "__main__":
    main()
