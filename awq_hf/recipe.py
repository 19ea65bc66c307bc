"""Recipe: every option of a quantization run in one object, which is passed whole and saved with the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from awq_hf.rounding import ROUNDERS
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_clip import ClipOptions
from awq_hf.transforms.awq_scale import ScaleOptions


@dataclass(frozen=True)
class Recipe:
    """What to do with every layer.

    scale, clip: options of the two searches of AWQ; None leaves them out.
    rounding: "nearest", "gptq" or "descent" (GPTQ, then coordinate descent on codes and scales).
    stream: the inputs that layers are fitted to: of the "float" model, or of the model as "quantized" so far.
    correction: aim at the float model's outputs in spite of the input error of the quantized stream.
    skip: Linears whose name contains one of these are left in float.
    samples, seq_len: calibration windows and their tokens; seed draws the windows.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    scale: ScaleOptions | None = field(default_factory=ScaleOptions)
    clip: ClipOptions | None = field(default_factory=ClipOptions)
    rounding: str = "descent"
    stream: Literal["float", "quantized"] = "quantized"
    correction: bool = True
    skip: tuple[str, ...] = ()
    samples: int = 128
    seq_len: int = 512
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDERS:
            raise ValueError(f"rounding={self.rounding!r} is not known; choose one of {list(ROUNDERS)}")
        if self.stream not in ("float", "quantized"):
            raise ValueError(f"stream={self.stream!r} is not known; choose 'float' or 'quantized'")
        for name, least in (("samples", 1), ("seq_len", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} is too small; give at least {least}")

    def skips(self, module_name: str) -> bool:
        """Substring match, as AutoAWQ and vLLM read `modules_to_not_convert`."""
        return any(part in module_name for part in self.skip)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
