"""modules_to_not_convert, written so that every loader reads it alike.

AutoAWQ, vLLM and SGLang leave out every module whose name contains an entry. transformers leaves out those that an entry matches from
their beginning up to a module's boundary, or that end in it. Full names of modules, as high up as nothing quantized is below, are
read alike by all, as long as none is contained in the name of something quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM and SGLang load as one matrix


def skip_list(left_in_float: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """Entries that leave out `left_in_float` and, for readers of full names, nothing that is in `quantized`."""
    entries: dict[str, None] = {}
    for name in left_in_float:
        parts = name.split(".")
        above = (".".join(parts[:n]) for n in range(1, len(parts)))
        entries[next((entry for entry in above if not any(entry in other for other in quantized)), name)] = None
    # Loaders know towers under names of their own ("visual" for "model.visual"): the last part alone helps those that match parts.
    short = [entry.rpartition(".")[2] for entry in entries if entry.count(".") == 1]
    return [*entries, *(part for part in dict.fromkeys(short) if part not in entries and not any(part in other for other in quantized))]


def caveats(entries: Iterable[str], left_in_float: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """What other loaders will stumble over, one sentence each."""
    found = []
    for entry in entries:
        if hit := next((other for other in quantized if entry in other), None):
            found.append(f"loaders that match parts of names (vLLM, AutoAWQ) take {hit} for float as well, because {entry} is")
    left, taken = set(left_in_float), set(quantized)
    for group in FUSED:
        for name in sorted(taken):
            parent, _, last = name.rpartition(".")
            missing = [f"{parent}.{other}" for other in group if last in group and f"{parent}.{other}" in left]
            if missing:
                found.append(
                    f"vLLM loads {', '.join(group)} as one matrix and refuses {parent}: {missing[0]} is float, {last} is quantized"
                )
                break
    return found
