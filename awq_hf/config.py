"""AwqConfig: what a user passes to from_pretrained and what config.json holds. Key names are translated here and nowhere else."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AwqConfig as TransformersAwqConfig

from awq_hf.calibration.data import Calibration
from awq_hf.kernels.foreign import VERSIONS
from awq_hf.kernels.layout import GEMM, WIDE, layout_for
from awq_hf.recipe import Recipe
from awq_hf.spec import QuantSpec
from awq_hf.transforms.awq_clip import ClipOptions
from awq_hf.transforms.awq_scale import ScaleOptions
from awq_hf.wording import option

_STORED = ("bits", "group_size", "zero_point", "version", "modules_to_not_convert")
# Our name -> the names others write, the first that is there counts
_SYNONYMS = {"bits": ("w_bit",), "group_size": ("q_group_size",), "version": ("format", "checkpoint_format")}

SEQ_LEN = 512

logger = logging.getLogger("awq_hf")


class AwqConfig(TransformersAwqConfig):
    """Options for quantizing inside from_pretrained, and the description of a quantized checkpoint.

    bits: 2, 3, 4 or 8; group_size: 16, 32, 64, 128, 256, or -1 for one group a row; zero_point: False for symmetric grids.
    modules_to_not_convert: Linears whose name contains one of these strings stay in float; a string in no module's name is refused.
    overrides: part of a name -> {"bits": ..., "group_size": ..., "zero_point": ...}, or None to leave those Linears in float; the first
        part that a name contains counts. Widths or groups that differ are our own format: other programs do not read it.
    calibration: samples windows of seq_len tokens (None: 512, or as many as the model takes) are drawn with seed from
        - None: the text that comes with the package;
        - the path of a UTF-8 text file, of a .jsonl, .json or .parquet file of records, or of a directory that `datasets` loads;
        - the name of a dataset, name[:config][:split], which is streamed (pip install "awq-hf[data]"). The split is train, or the
          first whose name begins so, if none is named: "wikitext:wikitext-2-raw-v1", "HuggingFaceH4/ultrachat_200k::train_sft";
        - a list of strings, of 1-D tensors or lists of token ids, of conversations (lists of {"role": ..., "content": ...}, through the
          tokenizer's chat template) or of records; a datasets.Dataset; or another iterable, which is read in its order, only as
          far as needed.
        A record is a dict with messages (or ShareGPT's conversations), text, content, prompt (with completion or response), or a
        single field with a string. Text calibrates the language tower of a model that also takes images or sound; the rest stays
        in float.
    tokenizer: a tokenizer, or a processor that has one, or the path or Hub id of either, where the one beside the model is not the
        right one (or there is none).
    scales_for: "Q4_K" or "Q4_1": scales that this GGUF type holds exactly, so that a GGUF file exported from the result has identical
        weights; costs next to nothing.
    scale, clip, rounding, correction, residual, stream, shrinkage: the parts of the method, see awq_hf.recipe.Recipe.

    Raises ValueError on values that do not exist and TypeError on options that do not exist.
    The class keeps the name of the one it replaces: transformers compares class names when it merges configs.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        zero_point: bool = True,
        modules_to_not_convert: list[str] | None = None,
        *,
        overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
        calibration: Calibration = None,
        samples: int = 128,
        seq_len: int | None = None,
        seed: int = 0,
        batch_size: int = 8,
        scale: bool = True,
        clip: bool = True,
        rounding: str = "descent",
        correction: bool = True,
        residual: bool = True,
        stream: str = "quantized",
        shrinkage: float = 0.3,
        scales_for: str | None = None,
        tokenizer: Any = None,
        version: str | None = None,
        backend: str = "auto",
    ) -> None:
        if isinstance(modules_to_not_convert, str):
            raise ValueError(f"modules_to_not_convert={modules_to_not_convert!r} is a string; give a list: [{modules_to_not_convert!r}]")
        names = () if modules_to_not_convert is None else modules_to_not_convert
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"modules_to_not_convert={modules_to_not_convert!r} is not a list of strings")
        if not isinstance(zero_point, bool):
            raise ValueError(f"zero_point={zero_point!r} is not true or false")
        if version not in (None, GEMM, WIDE):
            raise ValueError(f"version={version!r} can at most be read, not written; leave it out: {layout_for(bits)!r} is written")
        super().__init__(bits=bits, group_size=group_size, zero_point=zero_point, modules_to_not_convert=modules_to_not_convert)
        # After the base class, which has attributes of the same names for GPTQ.
        self.calibration, self.samples, self.seq_len, self.seed, self.batch_size = calibration, samples, seq_len, seed, batch_size
        self.scale, self.clip, self.rounding, self.correction, self.stream = scale, clip, rounding, correction, stream
        self.residual, self.shrinkage = residual, shrinkage
        self.scales_for, self.tokenizer, self.backend = scales_for, tokenizer, backend
        self.overrides = _checked_overrides(overrides or {})
        self.output_dir: Path | None = None  # where quantize() will write: checked for room before any work
        self.keep_in: Path | None = None  # where quantize() keeps finished blocks, to resume
        self.trust_remote_code = False  # whether quantize() may run what comes with the model: its tokenizer may be of that kind
        self.extra: dict[str, Any] = {}  # keys of a checkpoint's config that we do not use and do not lose
        recipe = self.recipe()  # refuses what does not exist
        # None: read from a config that does not say
        self.version: str | None = version or (layout_for(bits) if recipe.is_uniform else WIDE)

    @classmethod
    def plain_rounding(cls, **options: Any) -> AwqConfig:
        """The baseline: every weight rounded to the nearest code, nothing searched (calibration still measures the layers' losses)."""
        return cls(**{**options, "scale": False, "clip": False, "correction": False, "rounding": "nearest", "stream": "float"})

    def post_init(self) -> None:
        """Nothing: the base class calls this before our options are set; __init__ validates at its end."""

    def spec(self) -> QuantSpec:
        return QuantSpec(bits=self.bits, group_size=self.group_size, symmetric=not self.zero_point)

    def _override(self, part: str, options: dict[str, Any]) -> QuantSpec:
        if unknown := options.keys() - {"bits", "group_size", "zero_point"}:
            raise ValueError(f"overrides[{part!r}] has no option {sorted(unknown)[0]!r}; give bits, group_size or zero_point")
        bits, group_size, zero_point = (options.get(key, getattr(self, key)) for key in ("bits", "group_size", "zero_point"))
        try:
            return QuantSpec(bits, group_size, symmetric=not zero_point)
        except ValueError as error:
            raise ValueError(f"{option('overrides')}: {part!r}: {error}") from None

    def spec_of(self, module_name: str) -> QuantSpec:
        """How a module of a quantized checkpoint is stored. The skip list has no say: the tensors tell what is quantized."""
        return next((spec for part, spec in self.recipe().overrides if spec is not None and part in module_name), self.spec())

    def recipe(self, positions: int | None = None) -> Recipe:
        """The same options as the pipeline takes them. positions: how many tokens the model takes at once, where that is known."""
        if positions is not None and self.seq_len is not None and self.seq_len > positions:
            raise ValueError(
                f"{option('seq_len', self.seq_len)} is longer than the {positions} positions of the model; give at most {positions}"
            )
        return Recipe(
            spec=self.spec(),
            scale=ScaleOptions() if self.scale else None,
            clip=ClipOptions() if self.clip else None,
            rounding=self.rounding,
            stream=self.stream,  # type: ignore[arg-type]
            scales_for=self.scales_for,
            correction=self.correction,
            residual=self.residual,
            shrinkage=self.shrinkage,
            skip=tuple(self.modules_to_not_convert or ()),
            overrides=tuple((part, None if options is None else self._override(part, options)) for part, options in self.overrides.items()),
            samples=self.samples,
            seq_len=min(SEQ_LEN, positions or SEQ_LEN) if self.seq_len is None else self.seq_len,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read config.json's quantization_config. Unknown keys are kept and written back."""
        found: dict[str, Any] = {}
        for key in _STORED:
            given = [config_dict[name] for name in (key, *_SYNONYMS.get(key, ())) if config_dict.get(name) is not None]
            if given:
                found[key] = given[0]
        if isinstance(config_dict.get("sym"), bool):
            found.setdefault("zero_point", not config_dict["sym"])
        version = found.pop("version", None)
        if config_dict.get("backend") == "llm-awq":
            version = "llm-awq"  # its script writes version gemv whatever the tensors are
        if not isinstance(version, str | None):
            raise ValueError(f"quantization_config: version={version!r} is not a name")
        config = cls(**found, overrides=config_dict.get("overrides"))
        config.version = version if version is None else version.lower()
        config.extra = {key: value for key, value in config_dict.items() if key not in (*_STORED, "overrides", "quant_method")}
        unused = config.update(**kwargs)
        return (config, unused) if return_unused_kwargs else config

    def describe(self, specs: Iterable[QuantSpec]) -> None:
        """Describe matrices of these specs in the layout that is written, from now on, under every name that the config came with."""
        specs = list(specs)
        version = WIDE if self.version == WIDE or any(spec.bits != 4 for spec in specs) else GEMM
        zero_point = not all(spec.symmetric for spec in specs)
        self.version, self.zero_point = version, zero_point
        changed: dict[str, Any] = {name: version for name in _SYNONYMS["version"] if str(self.extra.get(name)).lower() in VERSIONS}
        changed |= {"backend": "autoawq"} if self.extra.get("backend") == "llm-awq" else {}
        changed |= {"pack_dtype": "int32"} if "pack_dtype" in self.extra else {}
        changed |= {"sym": not zero_point} if "sym" in self.extra else {}
        self.extra.update(changed)

    @classmethod
    def coerce(cls, config: TransformersAwqConfig) -> AwqConfig:
        """Transformers' own AwqConfig as ours; of ours a copy, so that what a run adds to it does not reach the user's object."""
        if isinstance(config, cls):
            return copy.deepcopy(config)
        if not isinstance(config, TransformersAwqConfig):
            raise TypeError(f"{config!r:.200} is not an AwqConfig; give AwqConfig(bits=4, group_size=128), say")
        return cls(
            bits=config.bits,
            group_size=config.group_size,
            zero_point=config.zero_point,
            modules_to_not_convert=config.modules_to_not_convert,
            tokenizer=config.tokenizer,
        )

    def to_quantize(self) -> AwqConfig:
        """The same for a float model. Where a dictionary was passed for it, options of ours came as keys that `from_dict` keeps; the rest
        of these is dropped, and a warning names those that are nobody's."""
        if not self.extra:
            return self
        theirs, ours = TransformersAwqConfig(bits=self.bits).to_dict(), inspect.signature(type(self)).parameters
        options = {name: value for name, value in self.extra.items() if name in ours and value != theirs.get(name)}
        known = {*ours, *theirs, *(synonym for names in _SYNONYMS.values() for synonym in names)}
        if unknown := sorted(self.extra.keys() - known):
            logger.warning("quantization_config: AwqConfig has no option of the name %s; it is ignored", " or ".join(unknown))
        stored = {name: getattr(self, name) for name in _STORED if name != "version"}
        return type(self)(**stored, overrides=self.overrides, **options)

    def to_dict(self) -> dict[str, Any]:
        """AutoAWQ's keys, and whatever else the checkpoint came with."""
        stored = {**self.extra, "quant_method": "awq", **{key: getattr(self, key) for key in _STORED}}
        kept = {part: options for part, options in self.overrides.items() if options is not None}  # the others are in the skip list
        return {**stored, "overrides": kept} if kept else stored

    def get_loading_attributes(self) -> dict[str, Any]:
        return {}

    def __repr__(self) -> str:
        return f"AwqConfig({', '.join(f'{key}={getattr(self, key)!r}' for key in _STORED)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> AwqConfig:
        # transformers copies the model's config several times; calibration data and tokenizers are shared, not copied.
        copied = copy.copy(self)
        copied.modules_to_not_convert = copy.copy(self.modules_to_not_convert)
        copied.overrides = copy.deepcopy(self.overrides, memo)
        copied.extra = copy.deepcopy(self.extra, memo)
        return copied


def _checked_overrides(given: Any) -> dict[str, dict[str, Any] | None]:
    """A copy. Raises ValueError for what is not of the form {part of a name: options or None}."""
    example = 'give {"down_proj": {"bits": 8}, "k_proj": None}, say, where None leaves it in float'
    if not isinstance(given, Mapping):
        raise ValueError(f"overrides={given!r} is not a dictionary; {example}")
    for part, options in given.items():
        if not isinstance(options, Mapping | None):
            raise ValueError(f"overrides[{part!r}] is {options!r}; {example}")
    return {part: None if options is None else dict(options) for part, options in given.items()}
