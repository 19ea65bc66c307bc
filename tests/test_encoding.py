"""The search of GGUF's types from float weights, on a tiny model whose rows superblocks divide."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn

from awq_hf.calibration.data import Windows, load_windows
from awq_hf.encoded_layer import Encoded, EncodedLayer, codes_together, decode, encode, prepare
from awq_hf.encoding import encode_model
from awq_hf.recipe import Recipe

RECIPE = Recipe(samples=8, seq_len=48)
MIX = {"v_proj": Type.Q6_K, "k_proj": Type.Q5_K, "down_proj": Type.Q3_K, "o_proj": Type.Q2_K}  # others: Q4_K


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(hidden_size=256, intermediate_size=256, num_hidden_layers=1)


@pytest.fixture(scope="module")
def windows(tokens: list[Tensor]) -> Windows:
    return load_windows(tokens, None, RECIPE.seq_len, samples=RECIPE.samples, seed=0)


def linears(model: Any) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def searched(model: Any, windows: Windows, kind: Type | dict[str, Type], recipe: Recipe = RECIPE) -> tuple[Any, Encoded]:
    """A copy of the model, and what was found. kind: of all Linears, or of each."""
    own = copy.deepcopy(model)
    return own, encode_model(own, kind if isinstance(kind, dict) else dict.fromkeys(linears(model), kind), recipe, windows)


def layers(encoded: Encoded) -> dict[str, EncodedLayer]:
    assert encoded.report is not None
    found = {layer.name.rpartition(".")[2]: layer for layer in encoded.report.layers}
    assert all(isinstance(layer, EncodedLayer) for layer in found.values())
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def mixed(model: Any, windows: Windows) -> tuple[Any, Encoded]:
    return searched(model, windows, {name: MIX.get(name.rpartition(".")[2], Type.Q4_K) for name in linears(model)})


def test_the_model_holds_what_the_blocks_say(model: Any, mixed: Any) -> None:
    found, encoded = mixed
    assert list(encoded.weights) == list(linears(model)) == list(linears(found))
    for name, linear in linears(found).items():
        weight = encoded.weights[name]
        assert type(linear) is nn.Linear
        assert weight.kind == MIX.get(name.rpartition(".")[2], Type.Q4_K).name
        assert weight.shape == linear.weight.shape
        assert torch.equal(torch.from_numpy(gguf.dequantize(weight.data.numpy(), Type[weight.kind])), linear.weight)


def test_norms_and_biases_take_the_other_half_of_the_smoothing(model: Any, windows: Windows) -> None:
    """norm / s and W s, and for values and what goes up, W / s and b / s: undone, the weights are those of the float model."""
    recipe = Recipe(samples=8, seq_len=48, correction=False, rounding="nearest")  # weights stay near those of the float model
    found, encoded = searched(model, windows, Type.Q4_K, recipe)
    before, after = model.model.layers[0], found.model.layers[0]
    about = layers(encoded)
    for norm, consumers in (("input_layernorm", "qk"), ("post_attention_layernorm", ("gate",))):
        s = before.get_submodule(norm).weight / after.get_submodule(norm).weight
        assert s.max() / s.min() > 1.1
        for name in consumers:
            layer = about[f"{name}_proj"]
            assert (layer.fold, layer.alpha > 0, layer.family.split()[0]) == (norm, True, "activations")
            owner = "mlp" if name == "gate" else "self_attn"
            old, new = (block.get_submodule(f"{owner}.{name}_proj") for block in (before, after))
            assert (new.weight / s - old.weight).norm() < 0.1 * old.weight.norm() < (new.weight - old.weight).norm()
            assert torch.equal(new.bias, old.bias)
    assert about["down_proj"].fold == "mlp.up_proj" and about["down_proj"].alpha > 0
    s = before.mlp.up_proj.bias / after.mlp.up_proj.bias
    assert s.max() / s.min() > 1.1
    undone = after.mlp.down_proj.weight / s
    assert (undone - before.mlp.down_proj.weight).norm() < 0.1 * undone.norm()


def test_a_type_that_loses_next_to_nothing_leaves_the_model_as_it_was(model: Any, windows: Windows, prompt: Tensor) -> None:
    found, encoded = searched(model, windows, Type.Q8_0)
    with torch.no_grad():
        expected, logits = model(prompt).logits, found(prompt).logits
    assert 0 < float((logits - expected).norm() / expected.norm()) < 0.01
    assert max(layer.loss for layer in layers(encoded).values()) < 1e-4


def test_losses_are_below_those_of_an_importance_matrix_alone(mixed: Any) -> None:
    about = layers(mixed[1])
    for layer in about.values():
        assert 0 < layer.loss < layer.loss_importance
        assert layer.loss < layer.loss_plain
        assert "descent" in layer.rounding
    assert sum(layer.loss_importance for layer in about.values()) < sum(layer.loss_plain for layer in about.values())


def test_the_report_says_what_was_done(mixed: Any) -> None:
    about = layers(mixed[1])
    assert list(about) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    of = {name: (layer.kind, layer.bits, layer.group_size, layer.shape) for name, layer in about.items()}
    assert of["q_proj"] == ("Q4_K", 4, 256, (256, 256))
    assert of["v_proj"] == ("Q6_K", 6, 256, (128, 256))
    assert of["o_proj"] == ("Q2_K", 2, 256, (256, 256))
    report = mixed[1].report
    assert {"scale search", "encoding", "rounding", "held-out check"} <= report.seconds.keys()
    assert report.to_dict()["layers"][0]["loss_importance"] == about["q_proj"].loss_importance


def test_importance_is_the_mean_square_of_the_float_models_inputs(model: Any, mixed: Any, windows: Windows) -> None:
    seen: list[Tensor] = []
    module = model.model.layers[0].self_attn.k_proj
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, 256)))
    for batch in windows.batches(RECIPE.batch_size):
        if not batch.held_out:
            with torch.no_grad():
                model(batch.input_ids)
    hook.remove()
    assert min(windows.lengths) == RECIPE.seq_len  # no padding
    expected = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(mixed[1].importance["model.layers.0.self_attn.k_proj"], expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["IQ4_XS", "IQ4_NL"])
def test_types_whose_values_are_not_evenly_spaced_are_rounded_one_by_one(kind: str, model: Any, windows: Windows) -> None:
    down = {"model.layers.0.mlp.down_proj": Type[kind]}
    found, encoded = searched(model, windows, down)
    (layer,) = layers(encoded).values()
    assert set(layer.rounding.split(" and ")) <= {"importance", "corrected"}
    assert layer.loss < 1.02 * layer.loss_importance  # no row is better than its quantizer alone by much
    assert torch.equal(decode(encoded.weights["model.layers.0.mlp.down_proj"].data, Type[kind]), found.model.layers[0].mlp.down_proj.weight)


def test_what_is_not_asked_for_stays(model: Any, windows: Windows, prompt: Tensor) -> None:
    """The other consumer of a norm that is divided is multiplied by powers of two: exactly the same."""
    found, encoded = searched(model, windows, {"model.layers.0.mlp.gate_proj": Type.Q3_K})
    assert list(encoded.weights) == ["model.layers.0.mlp.gate_proj"]
    before, after = model.model.layers[0], found.model.layers[0]
    s = before.post_attention_layernorm.weight / after.post_attention_layernorm.weight
    assert len(s.unique()) > 1
    assert torch.equal(s.log2(), s.log2().round())
    assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight * s)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        assert torch.equal(after.get_submodule(name).weight, before.get_submodule(name).weight)


def test_without_correction_and_descent_only_the_quantizer_is_left(model: Any, windows: Windows) -> None:
    name, recipe = "model.layers.0.self_attn.q_proj", Recipe(samples=8, seq_len=48, scale=None, correction=False, rounding="nearest")
    found, encoded = searched(model, windows, {name: Type.Q4_K}, recipe)
    (layer,) = layers(encoded).values()
    assert (layer.rounding, layer.correction, layer.fold) == ("importance", 0.0, None)
    # importance is of the float model's inputs; those of the first block are the same, but for the order that they were added in
    assert layer.loss == pytest.approx(layer.loss_importance, rel=1e-2)
    expected = encode(model.get_submodule(name).weight.detach(), Type.Q4_K, encoded.importance[name])
    assert (encoded.weights[name].data == expected).float().mean() > 0.99
    assert torch.equal(found.model.layers[0].input_layernorm.weight, model.model.layers[0].input_layernorm.weight)


def test_rows_that_blocks_do_not_divide_are_refused_before_any_work(tiny_llama: Any, windows: Windows) -> None:
    model = tiny_llama(hidden_size=256, intermediate_size=96, num_hidden_layers=1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^model.layers.0.mlp.down_proj: a row of 96 .* Q4_K's blocks of 256; Q8_0 or another type"):
        encode_model(model, dict.fromkeys(linears(model), Type.Q4_K), RECIPE, windows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_runs_are_alike_whatever_the_threads(model: Any, windows: Windows) -> None:
    kinds = {f"model.layers.0.{name}_proj": Type.Q4_K for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down")}
    found = []
    for threads in (1, 1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(searched(model, windows, kinds)[1].weights)
        finally:
            torch.set_num_threads(1)
    for name, weight in found[0].items():
        assert all(torch.equal(weight.data, other[name].data) for other in found[1:]), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K"])
def test_codes_that_are_chosen_together_have_less_error_on_the_same_steps(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 256, generator=generator) @ torch.randn(256, 256, generator=generator) / 16 + 1
    weight, H = torch.randn(24, 256, generator=generator), x.T @ x / 400  # noqa: N806
    weight[3, :64] = 0  # sub-blocks whose step is 0
    data = encode(weight, Type[kind], H.diagonal())
    together = codes_together(weight, data, Type[kind], prepare(H))
    error = lambda blocks: ((d := decode(blocks, Type[kind]) - weight) @ H * d).sum(1)  # noqa: E731
    assert (error(together) < error(data)).float().mean() > 0.9
    assert error(together).sum() < 0.9 * error(data).sum()
    assert not decode(together, Type[kind])[3, :32].any()
