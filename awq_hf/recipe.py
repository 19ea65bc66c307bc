"""Recipe: every option of a quantization run in one object, which is passed whole and saved with the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from awq_hf.representable import KINDS
from awq_hf.rounding import ROUNDERS
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_clip import ClipOptions
from awq_hf.transforms.awq_scale import ScaleOptions
from awq_hf.wording import option


@dataclass(frozen=True)
class Recipe:
    """What to do with every layer.

    scale, clip: options of the two searches of AWQ; None leaves them out.
    rounding: "nearest", "gptq" or "descent" (GPTQ, then coordinate descent on codes and scales).
    stream: the inputs that layers are fitted to: of the "float" model, or of the model as "quantized" so far.
    correction: aim at the float model's outputs in spite of the input error of the quantized stream.
    residual: with correction, layers whose output is added to the residual stream also make up for its errors (folding/residual.py).
    shrinkage: in [0, 1), of the correlations of inputs that rounding is fitted to, so that it holds for other text (rounding/gptq.py).
    skip: Linears whose name contains one of these are left in float.
    overrides: (part of a name, how those Linears are stored, or None to leave them in float); the first that fits counts.
    scales_for: "Q4_K" or "Q4_1": scales that this GGUF type holds exactly (awq_hf/representable.py); they are not refitted then.
    samples, seq_len: calibration windows and their tokens; seed draws the windows.
    """

    spec: QuantSpec = field(default_factory=QuantSpec)
    scale: ScaleOptions | None = field(default_factory=ScaleOptions)
    clip: ClipOptions | None = field(default_factory=ClipOptions)
    rounding: str = "descent"
    stream: Literal["float", "quantized"] = "quantized"
    correction: bool = True
    residual: bool = True
    shrinkage: float = 0.3
    skip: tuple[str, ...] = ()
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()
    scales_for: str | None = None
    samples: int = 128
    seq_len: int = 512
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDERS:
            raise ValueError(f"{option('rounding', self.rounding)} is not known; choose one of {list(ROUNDERS)}")
        if self.scales_for not in (None, *KINDS):
            raise ValueError(f"{option('scales_for', self.scales_for)} is not known; choose one of {list(KINDS)}")
        if "" in [part for part, _ in self.overrides] or "" in self.skip:
            raise ValueError(
                f"an empty string is part of every name; {option('modules_to_not_convert')} and {option('overrides')} need parts of names"
            )
        if self.stream not in ("float", "quantized"):
            raise ValueError(f"stream={self.stream!r} is not known; choose 'float' or 'quantized'")
        if not 0 <= self.shrinkage < 1:
            raise ValueError(f"shrinkage={self.shrinkage!r} is not in [0, 1); 0 takes correlations as they are, 0.3 is the default")
        for name, least in (("samples", 1), ("seq_len", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{option(name, getattr(self, name))} is too small; give at least {least}")

    def spec_for(self, *module_names: str) -> QuantSpec | None:
        """How a module is stored, or None where it stays in float. Names match by substring, as AutoAWQ and vLLM do it.

        module_names: what it is called; one that matches is enough.
        """
        called = lambda part: any(part in name for name in module_names)  # noqa: E731
        if any(map(called, self.skip)):
            return None
        return next((spec for part, spec in self.overrides if called(part)), self.spec)

    @property
    def mends_residuals(self) -> bool:
        """Whether layers make up for errors of the residual stream: only in the quantized stream there are any."""
        return self.residual and self.correction and self.stream == "quantized"

    @property
    def is_uniform(self) -> bool:
        """Whether everything that is quantized is stored alike, as AutoAWQ's format wants it."""
        return all(spec is None or (spec.bits, spec.group_size) == (self.spec.bits, self.spec.group_size) for _, spec in self.overrides)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
