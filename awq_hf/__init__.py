"""AWQ for Hugging Face transformers.

Importing this package takes over quant_method "awq" in transformers, which is its one side effect; `unregister()` gives it back.
"""

from importlib.metadata import version as _version

from awq_hf.api import export, quantize
from awq_hf.compat import register as _register
from awq_hf.compat import unregister
from awq_hf.config import AwqConfig
from awq_hf.evaluate import Evaluation, evaluate, evaluate_many
from awq_hf.hf_quantizer import AwqHfQuantizer
from awq_hf.linear import AwqLinear
from awq_hf.push import push_to_hub
from awq_hf.spec import QuantizedWeight, QuantSpec

__version__ = _version("awq-hf")
__all__ = [
    "AwqConfig",
    "AwqHfQuantizer",
    "AwqLinear",
    "Evaluation",
    "QuantSpec",
    "QuantizedWeight",
    "evaluate",
    "evaluate_many",
    "export",
    "push_to_hub",
    "quantize",
    "register",
    "unregister",
]


def register() -> None:
    """Take over quant_method "awq" (again). Importing the package has done so already."""
    _register(AwqHfQuantizer, AwqConfig)


register()
