"""llm-compressor: AWQ, GPTQ, and AWQ's scales followed by GPTQ; compressed-tensors' pack-quantized format."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset  # type: ignore[import-untyped]
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import CompressedTensorsConfig

from benchmarks.peer_drivers.driver import Job


def main() -> None:
    job = Job.read()
    tokens = job.tokens
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # pinning fails without an accelerator, and changes no number
    scheme = preset_name_to_scheme("W4A16_ASYM", ["Linear"])
    scheme.weights.num_bits, scheme.weights.group_size = job.bits, job.group_size
    rounding = QuantizationModifier if job.method == "awq" else GPTQModifier
    recipe = [AWQModifier(duo_scaling="both")] if "awq" in job.method else []  # "both": as its documentation recommends
    recipe.append(rounding(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    windows = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    model = AutoModelForCausalLM.from_pretrained(job.source, dtype=torch.float32)
    with job.measured("llmcompressor", "compressed-tensors"):
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(job.source),
            dataset=windows,
            recipe=recipe,
            max_seq_length=tokens.shape[1],
            num_calibration_samples=len(tokens),
            shuffle_calibration_samples=False,
        )
    model.save_pretrained(job.checkpoint, save_compressed=True)
    load = AutoModelForCausalLM.from_pretrained
    dense = load(job.checkpoint, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)).state_dict()
    job.write_dense({name: t for name, t in dense.items() if ".weight_" not in name})  # scales and shapes stay beside the weights
    job.keep_logits(load(job.checkpoint, dtype=torch.float32))


if __name__ == "__main__":
    main()
