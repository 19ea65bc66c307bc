"""AwqLinear: packed parameters that survive casts, copies and state dicts, and a forward without a dequantized copy."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from awq_hf import linear
from awq_hf.affine import dequantize_weight
from awq_hf.kernels import chunked, reference
from awq_hf.kernels.dispatch import CANONICAL, LAYOUTS, Layout
from awq_hf.kernels.problem import Problem
from awq_hf.linear import AwqLinear
from awq_hf.spec import QuantizedWeight, QuantSpec

pytestmark = pytest.mark.usefixtures("usual_kernels")

SPECS = [QuantSpec(4, 16), QuantSpec(4, -1, True), QuantSpec(2, 32), QuantSpec(3, 16), QuantSpec(8, -1)]


def random_weight(spec: QuantSpec, n_in: int = 64, n_out: int = 24, scale_dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(n_in + n_out + spec.bits)
    groups = n_in // spec.group_width(n_in)
    codes = lambda columns: torch.randint(0, spec.max_code + 1, (n_out, columns), generator=generator, dtype=torch.uint8)  # noqa: E731
    scales = (1 + torch.rand(n_out, groups, generator=generator)).to(scale_dtype)
    return QuantizedWeight(codes(n_in), scales, codes(groups), spec)


def assert_same_weight(a: QuantizedWeight, b: QuantizedWeight) -> None:
    dtypes = (a.scales.dtype, b.scales.dtype)
    assert dtypes[0] == dtypes[1]
    assert a.spec == b.spec
    assert torch.equal(a.q, b.q) and torch.equal(a.scales, b.scales) and torch.equal(a.zero_points, b.zero_points)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bias", [False, True])
def test_from_quantized_and_back(spec: QuantSpec, bias: bool) -> None:
    weight, b = random_weight(spec), torch.randn(24).bfloat16() if bias else None
    module = AwqLinear.from_quantized(weight, b)
    assert_same_weight(module.to_quantized(), weight)
    assert torch.equal(module.dequantize(torch.float32), dequantize_weight(weight))
    assert module.dequantize(torch.bfloat16).dtype == torch.bfloat16 and module.dequantize(torch.float32).is_contiguous()
    assert module.bias is None if b is None else torch.equal(module.bias, b)
    assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_have_the_names_shapes_and_dtypes_of_the_file(spec: QuantSpec) -> None:
    module = AwqLinear(64, 24, spec, bias=True, dtype=torch.bfloat16, device="meta")
    groups, words = 64 // spec.group_width(64), -(-24 * spec.bits // 32)
    assert {name: (tuple(p.shape), p.dtype) for name, p in module.named_parameters()} == {
        "qweight": ((64, words), torch.int32),
        "qzeros": ((groups, words), torch.int32),
        "scales": ((groups, 24), torch.float16),
        "bias": ((24,), torch.bfloat16),
    }
    assert f"bits={spec.bits}" in repr(module) and not isinstance(module, nn.Linear)


def test_forward_is_the_dequantized_linear() -> None:
    torch.manual_seed(0)
    weight, bias = random_weight(QuantSpec(4, 16)), torch.randn(24)
    x = torch.randn(2, 5, 64)
    expected = nn.functional.linear(x.double(), dequantize_weight(weight).double(), bias.double())
    torch.testing.assert_close(AwqLinear.from_quantized(weight, bias)(x).double(), expected, rtol=1e-5, atol=1e-4)


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "to(cpu, bfloat16)": lambda m: m.to("cpu", torch.bfloat16),
    "twice": lambda m: m.bfloat16().float(),
    "deepcopy": lambda m: copy.deepcopy(m),
    "deepcopy of a cast": lambda m: copy.deepcopy(m.bfloat16()),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_casting_a_model_keeps_the_stored_weight_bit_for_bit(cast: Callable[[nn.Module], nn.Module], scale_dtype: torch.dtype) -> None:
    weight = random_weight(QuantSpec(4, 16), scale_dtype=scale_dtype)
    model = cast(nn.Sequential(AwqLinear.from_quantized(weight, torch.ones(24))))
    module = model[0]  # type: ignore[index]
    assert_same_weight(module.to_quantized(), weight)
    assert isinstance(module.scales, nn.Parameter) and not module.scales.requires_grad
    assert module.qweight.dtype == module.qzeros.dtype == torch.int32


def test_casting_a_model_casts_the_bias() -> None:
    module = AwqLinear.from_quantized(random_weight(QuantSpec(4, 16)), torch.ones(24))
    assert module.to(torch.bfloat16).bias.dtype == torch.bfloat16


def test_moving_to_meta_and_to_empty_keeps_dtypes() -> None:
    module = AwqLinear.from_quantized(random_weight(QuantSpec(4, 16))).to("meta", torch.bfloat16)
    assert module.scales.is_meta and module.qweight.is_meta and module.scales.dtype == torch.float16
    assert module.to_empty(device="cpu").scales.dtype == torch.float16


@pytest.mark.parametrize("spec", SPECS)
def test_state_dict_round_trip(spec: QuantSpec) -> None:
    weight = random_weight(spec)
    saved = AwqLinear.from_quantized(weight, torch.arange(24.0))
    file = io.BytesIO()
    torch.save(saved.state_dict(), file)
    file.seek(0)
    loaded = AwqLinear(64, 24, spec, bias=True)
    loaded.load_state_dict(torch.load(file))
    assert_same_weight(loaded.to_quantized(), weight)
    assert torch.equal(loaded.bias, torch.arange(24.0))


def test_state_dict_of_another_shape_is_refused() -> None:
    state = AwqLinear.from_quantized(random_weight(QuantSpec(4, 16))).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for qzeros"):
        AwqLinear(64, 24, QuantSpec(4, 32)).load_state_dict(state)


def test_in_features_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="in_features 40 is not divisible by group_size 16; group sizes that divide it: .-1."):
        AwqLinear(40, 24, QuantSpec(4, 16))


def test_forward_never_holds_a_whole_dequantized_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    module = AwqLinear.from_quantized(random_weight(QuantSpec(4, 16), n_out=136))
    x = torch.randint(-2, 3, (3, 64)).float()
    sizes: list[int] = []
    plain = reference.dequantize

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        result = plain(*args, **kwargs)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(chunked, "CHUNK_WEIGHTS", 64 * 64)
    monkeypatch.setattr(reference, "dequantize", counted)
    y = module(x)
    assert sizes == [64 * 64, 64 * 64, 64 * 8]
    monkeypatch.undo()
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("spec", [QuantSpec(4, 16), QuantSpec(3, 32)])
def test_compiles_as_one_graph(spec: QuantSpec) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(AwqLinear.from_quantized(random_weight(spec), torch.randn(24)), nn.SiLU())
    x = torch.randn(3, 64)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


# Prepared for a kernel: another layout in memory, the same file


@pytest.fixture(params=[name for name in LAYOUTS if name != "canonical"])
def prepared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AwqLinear:
    """A module in a layout that its device would always be given."""
    monkeypatch.setattr(linear, "choose_layout", lambda problem: (LAYOUTS[request.param], None))
    module = AwqLinear.from_quantized(random_weight(QuantSpec(4, 32)), torch.arange(24.0))
    module.prepare(torch.float32)
    assert module.layout == request.param
    return module


def test_a_prepared_module_holds_one_copy_of_the_weight(prepared: AwqLinear) -> None:
    assert [name for name, _ in prepared.named_parameters()] == [*LAYOUTS[prepared.layout].parts, "bias"]
    assert not any(p.requires_grad for p in prepared.parameters())


def test_a_prepared_module_computes_and_gives_back_the_same(prepared: AwqLinear) -> None:
    weight, x = random_weight(QuantSpec(4, 32)), torch.randn(3, 64)
    assert_same_weight(prepared.to_quantized(), weight)
    assert torch.equal(prepared.dequantize(torch.float32), dequantize_weight(weight))
    expected = AwqLinear.from_quantized(weight, torch.arange(24.0))(x)
    tolerance = 0.01 if prepared.layout == "cpu" else 1e-5  # torch's kernel computes in bfloat16
    assert float((prepared(x) - expected).norm() / expected.norm()) < tolerance


def test_the_state_dict_of_a_prepared_module_is_the_file(prepared: AwqLinear) -> None:
    plain = AwqLinear.from_quantized(random_weight(QuantSpec(4, 32)), torch.arange(24.0))
    state, expected = prepared.state_dict(), plain.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) and state[name].dtype == expected[name].dtype for name in expected)


def test_a_module_is_prepared_anew_for_where_it_is_and_what_comes_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that no kernel took before: a model that is loaded on a CPU, cast and moved to a GPU."""
    asked: list[tuple[str, torch.dtype]] = []

    def choose(problem: Problem) -> tuple[Layout, str | None]:
        asked.append((problem.device, problem.dtype))
        return (LAYOUTS["triton"], None) if problem.dtype == torch.float16 else (CANONICAL, "none")

    monkeypatch.setattr(linear, "choose_layout", choose)
    module = AwqLinear.from_quantized(random_weight(QuantSpec(4, 32)))
    assert module.to(torch.float16).layout == "canonical" and asked == []  # it was not asked for
    module.prepare(torch.float32)
    assert [module.to("cpu").layout, module.half().layout, module.to("meta").layout] == ["canonical", "triton", "triton"]
    assert asked == [("cpu", torch.float32), ("cpu", torch.float32), ("cpu", torch.float16), ("meta", torch.float16)]


def test_a_state_dict_is_loaded_into_a_prepared_module(prepared: AwqLinear) -> None:
    layout, other = prepared.layout, random_weight(QuantSpec(4, 32), scale_dtype=torch.bfloat16)
    prepared.load_state_dict(AwqLinear.from_quantized(other, torch.zeros(24)).state_dict(), assign=True)
    assert prepared.layout == layout
    assert_same_weight(prepared.to_quantized(), other)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
def test_casting_a_prepared_module_keeps_weight_and_layout(cast: Callable[[nn.Module], nn.Module], prepared: AwqLinear) -> None:
    layout, module = prepared.layout, cast(nn.Sequential(prepared))[0]  # type: ignore[index]
    assert module.layout == layout
    assert_same_weight(module.to_quantized(), random_weight(QuantSpec(4, 32)))


def test_a_move_leads_to_the_layout_of_the_other_device(prepared: AwqLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert prepared.to("meta").layout == "canonical"
    assert [name for name, _ in prepared.named_parameters()] == ["qweight", "qzeros", "scales", "bias"]
