"""auto-round: its signed gradient descent, and its AWQ; AWQ's format at 4 bits, rounded weights as floats (its "fake" format) at others.

transformers loads neither its AWQ format nor its own in that environment: for the first it wants gptqmodel, and of the other it left the
quantized weights uninitialized. So logits are those of the model that auto-round has in memory before it packs the weights; of other
widths than 4, which awq-hf does not read in its own format, so are the weights.
In saving, tensors that the float model's files hold in float32 are put back from there, over norms that AWQ's scales were folded into.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.peer_drivers.driver import Job

ITERATIONS = {"signround": 200, "signround-best": 1000}  # its default; what it calls best


def main() -> None:
    job = Job.read()
    tokens = job.tokens
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    tuning = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(job.source),
        scheme="W4A16",
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        dataset=DataLoader(rows, batch_size=8),  # type: ignore[arg-type]
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        enable_torch_compile=False,
        low_cpu_mem_usage=False,  # which packs block by block
        **({"iters": ITERATIONS[job.method]} if job.method in ITERATIONS else {"alg_configs": "awq"}),
    )
    save = tuning.save_quantized

    def look_and_save(*args: Any, **options: Any) -> Any:
        job.keep_logits(tuning.model)
        if job.bits != 4:
            job.write_dense(tuning.model.state_dict())
        return save(*args, **options)

    tuning.save_quantized = look_and_save
    with job.measured("auto-round"):
        _, folder = tuning.quantize_and_save(str(job.folder / "written"), format="auto_awq" if job.bits == 4 else "fake")
    Path(folder).rename(job.checkpoint)


if __name__ == "__main__":
    main()
