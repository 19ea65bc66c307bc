"""GPTQModel: its GPTQ, that with asymmetric calibration (GPTAQ), and its AWQ, which packs no float32 model."""

from __future__ import annotations

import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # read at import; it fails with the number that it takes of a machine with two cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or it compiles for minutes to run a small model once

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTAQConfig, GPTQConfig
from safetensors.torch import load_file

from benchmarks.peer_drivers.driver import Job


def main() -> None:
    job = Job.read()
    shape = dict(bits=job.bits, group_size=job.group_size, sym=False)
    if job.method == "awq":
        config, backend = AWQConfig(**shape, format=FORMAT.GEMM), BACKEND.TORCH_AWQ
    else:
        # gptq_v2: the first format has no zero point of 0
        more = dict(gptaq=GPTAQConfig(device="cpu")) if job.method == "gptaq" else {}
        config, backend = GPTQConfig(**shape, format=FORMAT.GPTQ_V2, **more), BACKEND.TORCH
    windows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in job.tokens]
    model = GPTQModel.load(job.source, config, device="cpu", dtype=torch.float16 if job.method == "awq" else torch.float32)
    with job.measured("gptqmodel"):
        model.quantize(windows, batch_size=8)
    model.save(str(job.checkpoint))
    quantized = GPTQModel.load(str(job.checkpoint), backend=backend, device="cpu", dtype=torch.float16).model  # float32 is refused
    job.keep_logits(quantized)
    if job.method != "awq":
        stored = {name: t for file in job.checkpoint.glob("*.safetensors") for name, t in load_file(file).items()}
        modules = {name: module for name, module in quantized.named_modules() if hasattr(module, "dequantize_weight")}
        dense = {name: t for name, t in stored.items() if name.rpartition(".")[0] not in modules}
        job.write_dense(dense | {f"{name}.weight": module.float().dequantize_weight().T for name, module in modules.items()})


if __name__ == "__main__":
    main()
