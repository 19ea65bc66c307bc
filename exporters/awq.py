"""The awq target: what save_pretrained writes of a quantized model. AutoAWQ's gemm for 4 bits, our own layout for other widths."""

from __future__ import annotations

import copy
from pathlib import Path

from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.folder import MAX_SHARD_SIZE, Bar, items_with_bar, packed_tensors, write_folder
from awq_hf.exporters.modules import find_modules
from awq_hf.exporters.refusals import check_quantized
from awq_hf.linear import pack_weight
from awq_hf.skip_list import skip_list


def export(checkpoint: Checkpoint, directory: Path, bar: Bar, max_shard_size: str | int = MAX_SHARD_SIZE) -> None:
    """Scales keep their dtype, and activations their scales, so that nothing is rounded and nothing is lost."""
    check_quantized(checkpoint, "awq")
    assert checkpoint.quantization is not None
    quantization, modules = copy.deepcopy(checkpoint.quantization), find_modules(checkpoint)
    left = modules.left_out() if modules.experts else modules.in_float  # routers may be called otherwise on disk
    quantized = list(dict.fromkeys(name for owner in modules.quantized for name in modules.both_names(owner)))
    quantization.describe(packed.spec for packed in checkpoint.packed.values())
    quantization.modules_to_not_convert = skip_list(left, quantized) or None
    config = {"quantization_config": quantization.to_dict()}
    write_folder(directory, checkpoint, packed_tensors(items_with_bar(checkpoint, "awq", bar), pack_weight), config, max_shard_size)
