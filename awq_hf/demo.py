"""`awq-hf demo`: the whole way of a model, on one that comes with the package."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq_hf.api import check_output, save
from awq_hf.config import AwqConfig
from awq_hf.evaluate import Evaluation, evaluate
from awq_hf.linear import AwqLinear

SEQ_LEN = 256
EVALUATION_TOKENS = 40_000
PROMPT = "The state of our Union"


def run(out: Path, bits: int, group_size: int, console: Console) -> None:
    """Quantize, compare, save, reload, generate; prints what it does and leaves the model in `out`."""
    target = check_output(out)
    data = Path(str(resources.files("awq_hf") / "data" / "demo"))
    source = str(data / "model")
    options: dict[str, Any] = {"bits": bits, "group_size": group_size, "calibration": data / "calibration.txt"}
    tokenizer = AutoTokenizer.from_pretrained(source)
    say = lambda text: console.print(text, highlight=False)  # noqa: E731
    say(
        "A Llama with 2.6 million parameters, trained on presidential addresses, Genesis and Shakespeare, comes with the package.\n"
        f"It is now quantized to {bits} bits, which is what this line does with any model:\n\n"
        f"  [bold]AutoModelForCausalLM.from_pretrained(id, quantization_config=AwqConfig(bits={bits}, group_size={group_size}))[/]\n"
    )
    original = AutoModelForCausalLM.from_pretrained(source)
    plain = AutoModelForCausalLM.from_pretrained(source, quantization_config=AwqConfig.plain_rounding(**options, samples=8, seq_len=SEQ_LEN))
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=AwqConfig(**options, samples=64, seq_len=SEQ_LEN))
    say(model.awq_report.summary())

    measure = lambda m: evaluate(m, original, data / "evaluation.txt", tokenizer, SEQ_LEN, EVALUATION_TOKENS)  # noqa: E731
    evaluations = {"original": measure(original), "plain rounding": measure(plain), "awq-hf": measure(model)}
    save(model, target, tokenizer)
    console.print(_table(evaluations, {"original": original, "plain rounding": plain, "awq-hf": model}))
    share = evaluations["awq-hf"].kl / max(evaluations["plain rounding"].kl or 0, 1e-12)  # type: ignore[operator]
    say(
        "KL is how far the next-token probabilities are from the original's (nats, lower is better); same top-1 is how often the most\n"
        f"likely next token is the same. awq-hf leaves {share:.0%} of plain rounding's divergence.\n"
    )

    loaded = AutoModelForCausalLM.from_pretrained(target)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        equal = torch.equal(loaded(**prompt).logits, model(**prompt).logits)
    if not equal:
        raise RuntimeError(f"the model loaded from {target} does not compute the same logits as the one that was saved")
    say(f"Saved to {out} and loaded again: the logits are equal to the last bit. Both go on from the same words:\n")
    for name, each in (("original", original), ("awq-hf", loaded)):
        say(f"  [bold]{name:>9}[/]  {_continue(each, tokenizer, prompt)}")
    say(f"\nLook at {out / 'report.json'} for what happened to every layer, or quantize a model of yours:\n\n  awq-hf quantize MODEL OUT")


def _table(evaluations: dict[str, Evaluation], models: dict[str, Any]) -> Table:
    first = next(iter(evaluations.values()))
    title = f"On {first.tokens:,} tokens of text that neither training nor calibration saw"
    table = Table("", "size", "bits per weight", "perplexity", "KL", "same top-1", title=title, title_justify="left")
    for name, evaluation in evaluations.items():
        size = models[name].get_memory_footprint(return_buffers=False)
        table.add_row(
            name,
            f"{size / 1e6:.2f} MB",
            f"{bits_per_weight(models[name]):.2f}",
            f"{evaluation.perplexity:.3f}",
            f"{evaluation.kl:.4f}",
            f"{evaluation.top1:.1%}",
        )
    return table


def bits_per_weight(model: Any) -> float:
    """Stored bits for each weight of the decoder's Linears (embeddings and norms stay as they are)."""
    linears = [m for m in model.get_decoder().modules() if isinstance(m, (AwqLinear, torch.nn.Linear))]
    stored = sum(p.numel() * p.element_size() * 8 for m in linears for n, p in m.named_parameters() if n != "bias")
    return stored / sum(m.in_features * m.out_features for m in linears)


def _continue(model: Any, tokenizer: Any, prompt: Any) -> str:
    ids = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
