"""HQQ: no calibration, zero points in float."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.peer_drivers.driver import Job


def main() -> None:
    job = Job.read()
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
    linears = {name: module for name, module in model.model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    stored, dense = {}, {}
    with job.measured("hqq"):
        found = {
            name: HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False) for name, module in linears.items()
        }
    for name, module in found.items():
        full = f"model.layers.{name}"
        stored[f"{full}.W_q"] = module.W_q.data
        stored |= {f"{full}.{part}": module.meta[part].half() for part in ("scale", "zero")}  # float16 is its default dtype
        dense[f"{full}.weight"] = module.dequantize()
        model.model.layers.set_submodule(name, module)
    job.checkpoint.mkdir()
    save_file({name: t.contiguous() for name, t in stored.items()}, job.checkpoint / "model.safetensors")
    job.write_dense(dense)
    job.keep_logits(model)


if __name__ == "__main__":
    main()
