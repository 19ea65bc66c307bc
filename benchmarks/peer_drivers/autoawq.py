"""AutoAWQ: "as shipped", and "copied", with the one bug mended that ruins it on a CPU.

Its search keeps the original weights as `{k: v.cpu() for k, v in module2inspect.state_dict().items()}`, copies on a GPU, but the weights
themselves on a CPU: they are never restored, and every candidate is tried on top of those before it.
"""

from __future__ import annotations

import torch
from awq import AutoAWQForCausalLM
from awq.modules.linear import gemm
from awq.quantize.quantizer import AwqQuantizer

from benchmarks.peer_drivers.driver import Job


class Copying(AwqQuantizer):
    """Hands the search a module whose state dict holds copies."""

    def _compute_best_scale(self, x, w_mean, x_mean, module2inspect, *others, **kwargs):  # type: ignore[no-untyped-def]
        module2inspect.state_dict = lambda: {k: v.clone() for k, v in torch.nn.Module.state_dict(module2inspect).items()}
        try:
            return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *others, **kwargs)
        finally:
            del module2inspect.state_dict


def main() -> None:
    job = Job.read()
    gemm.TRITON_AVAILABLE = False  # its kernels need a GPU; for the logits below
    tokens = job.tokens.tolist()
    model = AutoAWQForCausalLM.from_pretrained(job.source, device_map="cpu", torch_dtype=torch.float32)
    rows = [module.out_features for module in model.model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    with job.measured("autoawq"):
        model.quantize(
            None,  # a tokenizer is needed for texts only
            quant_config={"zero_point": True, "q_group_size": job.group_size, "w_bit": job.bits, "version": "GEMM"},
            calib_data=tokens,
            max_calib_samples=len(tokens),
            max_calib_seq_len=len(tokens[0]),
            apply_clip=all(count % 64 == 0 for count in rows),  # on by default; it asserts this
            quantizer_cls=Copying if job.method == "copied" else AwqQuantizer,
        )
    model.save_quantized(str(job.checkpoint))
    job.keep_logits(model.model)


if __name__ == "__main__":
    main()
