"""`awq-hf inspect`: what quantizing a float checkpoint will do and cost, or what a quantized checkpoint holds."""

from __future__ import annotations

from awq_hf.config import AwqConfig
from awq_hf.exporters.reading import PACKAGES
from awq_hf.inspection.contents import Contents, read_contents
from awq_hf.inspection.export import read_export
from awq_hf.inspection.forecast import Forecast, forecast
from awq_hf.inspection.source import open_source
from awq_hf.pipeline import Progress
from awq_hf.wording import option

__all__ = ["Contents", "Forecast", "inspect"]


def inspect(
    model: str,
    config: AwqConfig | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Forecast | Contents:
    """Look at a directory or Hub id, whose weights are not read but for one decoder block of each shape.

    config: as for quantizing an ordinary checkpoint; not for a quantized one. dtype, device: to quantize it with, or to run it with.
    revision: branch, tag or commit, for a Hub id. trust_remote_code: run code that comes with the model.
    Raises ValueError or FileNotFoundError for what cannot be read.
    """
    source = open_source(model, revision, trust_remote_code)
    if source.quantization is None:
        if any(name.endswith(".qweight") for name in source.headers):
            raise ValueError(f"{model} holds *.qweight, so it is quantized already, but its config.json has no quantization_config")
        return forecast(source, config or AwqConfig(), dtype, device, progress)
    if config is not None and source.quant_method in ("awq", *PACKAGES):
        raise ValueError(f"{option('config')} is about quantizing a float model, and {model} is quantized already; leave it out")
    if source.quant_method == "awq":
        return read_contents(source, dtype, device)
    if source.quant_method in PACKAGES:
        return read_export(source, device)
    raise ValueError(
        f"{model} is quantized already, with {source.quant_method}; awq-hf inspect reads float checkpoints, AWQ, {' and '.join(PACKAGES)}: "
        "give the float model"
    )
