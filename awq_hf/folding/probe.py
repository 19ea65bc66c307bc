"""Fold discovery by experiment: no architecture is known here.

Scaling by a power of two is exact in floating point, so a producer's output channels are scaled by powers of two and
the inputs of all later Linears are watched. A consumer whose input changes purely channel by channel can be folded
into that producer, and the pattern of the changes spells out which channel went where. Every fold that is found is
then carried out on the parameters and must leave the block's output unchanged: a consumer that was not seen (a
residual connection, a router) shows up there. The block runs as a float32 copy, with its real weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from awq_hf.folding.fold import FoldPoint, Gain, divided_parameters, multiplied_weight, reading_parameter, weight_of

TOLERANCE = 1e-5  # of a channel's largest value; powers of two are exact but for 1 + w norms, and a wrong fold is off by its whole share


@dataclass
class _Run:
    inputs: dict[str, Tensor] = field(default_factory=dict)  # Linear -> its input, [tokens, in]
    raw_inputs: dict[str, Tensor] = field(default_factory=dict)  # the tensors themselves: Linears that share one share scales
    order: list[str] = field(default_factory=list)  # producers as they finish, consumers (as "> name") as they start
    output: list[Tensor] = field(default_factory=list)


class BlockProbe:
    """A float32 copy of a block with one call's arguments, and the experiments that can be made on it.

    block: a decoder layer with real weights; args, kwargs: one recorded call; linears: names of the Linears that may be quantized,
    and of what else multiplies its input by a weight: experts, routers.
    """

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], linears: Iterable[str]) -> None:
        self.block = copy.deepcopy(block).to(torch.float32).eval()
        self.args, self.kwargs = _float_copy(args), _float_copy(dict(kwargs))
        self.linears = list(linears)
        self.producers = [
            name
            for name, module in self.block.named_modules()
            if isinstance(getattr(module, "weight", None), nn.Parameter) and (isinstance(module, nn.Linear) or weight_of(module).ndim == 1)
        ]
        self.baseline = self.run()

    @torch.no_grad()
    def run(self, exponents: Mapping[str, Tensor] | None = None, parameters: Mapping[str, Tensor] | None = None) -> _Run:
        """One forward, with producers' outputs multiplied by 2**exponents, or with other parameters."""
        run, handles = _Run(), []

        def on_input(name: str):  # type: ignore[no-untyped-def]
            def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = [*args, *kwargs.values()][0]
                run.order.append(f"> {name}")
                run.raw_inputs[name] = x
                run.inputs[name] = x.reshape(-1, x.shape[-1])

            return hook

        def on_output(name: str):  # type: ignore[no-untyped-def]
            def hook(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
                run.order.append(name)
                if exponents is not None and name in exponents and isinstance(output, Tensor):  # a router may give several
                    return output * torch.exp2(exponents[name].to(output))
                return None

            return hook

        for name in self.linears:
            handles.append(self.block.get_submodule(name).register_forward_pre_hook(on_input(name), with_kwargs=True))
        for name in self.producers:
            handles.append(self.block.get_submodule(name).register_forward_hook(on_output(name)))
        try:
            args, kwargs = _float_copy((self.args, self.kwargs))  # a block may change its arguments in place
            output = torch.func.functional_call(self.block, dict(parameters or {}), args, kwargs)
        finally:
            for handle in handles:
                handle.remove()
        shared = [dict(value) for value in kwargs.values() if isinstance(value, MutableMapping)]  # what later blocks will read
        run.output = [t for t in tree_flatten((output, shared))[0] if isinstance(t, Tensor) and t.is_floating_point()]
        return run

    def input_groups(self) -> list[tuple[str, ...]]:
        """Linears that read one and the same tensor, in the order of their execution."""
        groups: dict[int, list[str]] = {}
        for entry in self.baseline.order:
            name = entry.removeprefix("> ")
            if entry.startswith("> ") and name not in groups.get(id(self.baseline.raw_inputs[name]), []):
                groups.setdefault(id(self.baseline.raw_inputs[name]), []).append(name)
        return [tuple(names) for names in groups.values()]

    def not_run_once(self) -> dict[str, str]:
        """Linears that the block does not call exactly once, and that therefore stay in float -> why."""
        times = {name: self.baseline.order.count(f"> {name}") for name in self.linears}
        why = lambda n: "it did not run on the calibration text" if n == 0 else f"it runs {n} times in its block"  # noqa: E731
        return {name: why(count) for name, count in times.items() if count != 1}

    def groups_run_once(self) -> list[tuple[str, ...]]:
        """`input_groups` of the Linears that the block calls exactly once."""
        left_out = self.not_run_once()
        once = (tuple(name for name in group if name not in left_out) for group in self.input_groups())
        return [group for group in once if group]

    def output_is_unchanged(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether the block computes the same with these parameters in place of its own."""
        changed = self.run(parameters=parameters).output
        return len(changed) == len(self.baseline.output) and all(
            bool((_channel_error(a, b) <= 10 * TOLERANCE).all()) for a, b in zip(changed, self.baseline.output, strict=True)
        )


def _float_copy(arguments: Any) -> Any:
    """The arguments of a call, with tensors copied (floating ones to float32), and mappings that blocks share too."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(torch.float32, copy=True) if value.is_floating_point() else value.clone()
        if isinstance(value, MutableMapping):  # not one that tree_map knows
            value = copy.copy(value)
            value.update({key: _float_copy(inner) for key, inner in value.items()})
        return value

    return tree_map(copied, arguments)


def _channel_error(changed: Tensor, expected: Tensor) -> Tensor:
    """Largest difference of each channel (last dimension), as a share of the channel's largest value."""
    changed, expected = changed.reshape(-1, changed.shape[-1]), expected.reshape(-1, expected.shape[-1])
    return (changed - expected).abs().amax(0) / expected.abs().amax(0).clamp(min=1e-20)


def discover(probe: BlockProbe) -> list[FoldPoint]:
    """Every fold of the block that is found and verified; a consumer is folded into at most one producer."""
    folds: list[FoldPoint] = []
    taken: set[str] = set()
    for producer in probe.producers:
        if probe.baseline.order.count(producer) != 1:  # never called, or shared by two calls: not one place to divide
            continue
        fold = _fold_of(probe, producer)
        if fold is None or taken & set(fold.consumers) or not verify(probe, [fold]):
            continue
        folds.append(fold)
        taken |= set(fold.consumers)
    return folds


def verify(probe: BlockProbe, folds: Iterable[FoldPoint], seed: int = 0) -> bool:
    """Carry out all folds with random powers of two; true when the block's output is unchanged."""
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, Tensor] = {}

    def current(name: str, parameter: str) -> Tensor:
        return parameters.get(f"{name}.{parameter}", probe.block.get_submodule(name).get_parameter(parameter).data)

    for fold in folds:
        module = probe.block.get_submodule(fold.producer)
        channels = len(weight_of(module))
        exponents = torch.randint(-3, 4, (channels,), generator=generator).to(fold.channel_map.device)
        used = torch.zeros_like(exponents).index_fill_(0, fold.channel_map.unique(), 1)  # rows no consumer reads stay
        scales = torch.exp2((exponents * used).to(torch.float32))
        stand_in = nn.Module()
        for parameter, _ in module.named_parameters(recurse=False):
            stand_in.register_parameter(parameter, nn.Parameter(current(fold.producer, parameter), requires_grad=False))
        for parameter, value in divided_parameters(fold, stand_in, scales).items():
            parameters[f"{fold.producer}.{parameter}"] = value
        for consumer in fold.consumers:
            read = reading_parameter(probe.block.get_submodule(consumer))
            parameters[f"{consumer}.{read}"] = multiplied_weight(current(consumer, read), scales[fold.channel_map])
    return not parameters or probe.output_is_unchanged(parameters)


def _fold_of(probe: BlockProbe, producer: str) -> FoldPoint | None:
    """The fold of one producer, not yet verified."""
    module = probe.block.get_submodule(producer)
    channels = len(weight_of(module))
    after = probe.baseline.order.index(producer)
    later = {entry.removeprefix("> ") for entry in probe.baseline.order[after:] if entry.startswith("> ")}
    groups = [group for group in probe.input_groups() if later.issuperset(group)]
    maps = _read_channel_maps(probe, producer, groups, torch.arange(channels), channels)
    if not maps and isinstance(module, nn.Linear):  # a fused projection: only some of its rows go straight to a consumer
        for rows in _row_sets(probe, producer, groups, channels):
            maps = _read_channel_maps(probe, producer, groups, rows, channels)
            if maps:
                break
    if not maps:
        return None
    gain = _gain_of(probe, producer)
    first = next(iter(maps.values()))
    if gain is None or any(m.shape != first.shape or not torch.equal(m, first) for m in maps.values()):
        return None
    return FoldPoint(producer, gain, first, tuple(name for group in maps for name in group))


def _purely_scaled(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each channel of [tokens, in]: is it unchanged, is it doubled, is it dead (zero for every token)?"""
    dead = before.abs().amax(0) == 0
    return _channel_error(after, before) <= TOLERANCE, _channel_error(after, 2 * before) <= TOLERANCE, dead


def _responding(
    probe: BlockProbe, producer: str, groups: list[tuple[str, ...]], exponents: Tensor
) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
    """Groups whose input only doubles in some channels when the producer is scaled -> (doubled, dead) channels."""
    run = probe.run(exponents={producer: exponents})
    found = {}
    for group in groups:
        same, doubled, dead = _purely_scaled(probe.baseline.inputs[group[0]], run.inputs[group[0]])
        if bool((same | doubled | dead).all()):
            found[group] = (doubled & ~dead, dead)
    return found


def _read_channel_maps(
    probe: BlockProbe, producer: str, groups: list[tuple[str, ...]], rows: Tensor, channels: int
) -> dict[tuple[str, ...], Tensor]:
    """Spell each producer channel's number in bits, one forward a bit, and read it back at the consumers.

    rows: int64 numbers of the producer channels to try. Returns int64 [in] maps of the groups whose every channel is fed by exactly
    one of them.
    """
    device = probe.baseline.inputs[groups[0][0]].device if groups else None
    code = torch.zeros(channels, dtype=torch.int64, device=device)
    code[rows] = rows.to(code) + 1  # 0 is kept for "not fed by these rows"
    read: dict[tuple[str, ...], Tensor] = {group: torch.zeros(1, dtype=torch.int64, device=device) for group in groups}
    dead: dict[tuple[str, ...], Tensor] = {}
    for bit in range(channels.bit_length()):
        answers = _responding(probe, producer, list(read), (code >> bit) & 1)
        read = {group: read[group] | (doubled.to(torch.int64) << bit) for group, (doubled, _) in answers.items()}
        dead = {group: is_dead for group, (_, is_dead) in answers.items()}
        if not read:
            return {}
    return {g: m - 1 for g in read if (m := _fill_dead(read[g], dead[g], channels)) is not None and bool((m > 0).all())}


def _fill_dead(code: Tensor, dead: Tensor, channels: int) -> Tensor | None:
    """A channel that is zero for every token (behind a ReLU) says nothing; it is filled in when all others are in place."""
    if not bool(dead.any()):
        return code
    identity = torch.arange(1, len(code) + 1, device=code.device)
    in_place = len(code) == channels and bool((code == identity)[~dead].all()) and bool((~dead).any())
    return identity if in_place else None


def _row_sets(probe: BlockProbe, producer: str, groups: list[tuple[str, ...]], channels: int) -> Iterator[Tensor]:
    """Rows of a fused projection that may go straight to a consumer: a run at its end or start, then that run in every head.

    Query, key and value rows either follow each other or take turns head by head (GPT-NeoX, BLOOM, Falcon): the longest run that
    scales some consumer's input channel by channel is found first, and then repeated with every period that fits.
    """
    device = probe.baseline.inputs[groups[0][0]].device if groups else None

    def passes(rows: Tensor) -> bool:
        exponents = torch.zeros(channels, dtype=torch.int64, device=device)
        exponents[rows] = 1
        return any(bool(doubled.any()) for doubled, _ in _responding(probe, producer, groups, exponents).values())

    if not groups:
        return
    everything = torch.arange(channels)
    for run in (lambda n: everything[channels - n :], lambda n: everything[:n]):
        if not passes(run(1)):
            continue
        good, bad = 1, channels  # part of a run that passes passes too, so the boundary is found by bisection
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if passes(run(middle)) else (good, middle)
        yield run(good)
        for period in range(2 * good, channels // 2 + 1, good):
            if channels % period == 0:
                yield everything[torch.isin(everything % period, run(good) % period)]


def _gain_of(probe: BlockProbe, producer: str) -> Gain | None:
    """How the producer's parameters scale its output: tried on the module itself, with the input it had in the block."""
    module = probe.block.get_submodule(producer)
    if isinstance(module, nn.Linear):
        return "rows"
    calls: list[tuple[Any, Any]] = []
    handle = module.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    probe.run()
    handle.remove()
    (args, kwargs), weight = calls[0], weight_of(module)
    halves = torch.exp2(-(torch.arange(len(weight), device=weight.device) % 3).to(torch.float32))
    gains: tuple[Gain, ...] = ("weight", "weight+1")
    with torch.no_grad():
        expected = module(*args, **kwargs) * halves
        for gain in gains:
            fold = FoldPoint(producer, gain, torch.empty(0), ())
            changed = torch.func.functional_call(module, divided_parameters(fold, module, 1 / halves), args, kwargs)
            if bool((_channel_error(changed, expected) <= TOLERANCE).all()):
                return gain
    return None
