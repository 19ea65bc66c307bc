"""`awq-hf demo`: the whole way of a model, on one that comes with the package."""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from awq_hf.api import save
from awq_hf.config import AwqConfig
from awq_hf.evaluate import Evaluation, evaluate_many
from awq_hf.evaluation_table import ORIGINAL, OURS, PLAIN
from awq_hf.measure import bits_per_weight
from awq_hf.output import check_output
from awq_hf.report import REPORT_NAME
from awq_hf.to_gguf import to_gguf

DATA = Path(str(resources.files("awq_hf") / "data" / "demo"))
MODEL = DATA / "model"
CALIBRATION = DATA / "calibration.txt"
EVALUATION = DATA / "evaluation.txt"
SAMPLES, SEQ_LEN = 64, 256
EVALUATION_TOKENS = 40_000
PROMPT = "The state of our Union"
NEW_TOKENS = 32
GGUF_NAME = "demo.gguf"
LLAMA_CPP = "(not installed here; pip install xllamacpp brings it)"

INTRODUCTION = """\
A Llama with 2.6 million parameters comes with this package. It was trained on
presidential addresses, Genesis and Shakespeare. Now it is quantized to {bits} bits,
by the two lines that do it for any model:

  config = AwqConfig(bits={bits}, group_size={group_size})
  AutoModelForCausalLM.from_pretrained(model, quantization_config=config)
"""
EXPLANATION = """\
KL: how far the next-token probabilities are from the original's, in nats; lower
is better. Same top-1: how often the most likely next token is the same one.
awq-hf leaves {share:.0%} of the divergence that plain rounding causes.
"""
FAREWELL = """
Files are in {out}:
config.json and model.safetensors in AutoAWQ's format, the tokenizer,
{report}, which says what happened to every layer, and the same integers
for llama.cpp in {gguf}. Next, a model of yours:

  awq-hf quantize MODEL OUT
"""


def run(out: Path, bits: int, group_size: int, console: Console) -> None:
    """Quantize, compare, save, reload, generate; prints what it does and leaves the model in `out`."""
    target = check_output(out)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    options: dict[str, Any] = dict(bits=bits, group_size=group_size, calibration=CALIBRATION, samples=SAMPLES, seq_len=SEQ_LEN)
    say(INTRODUCTION.format(bits=bits, group_size=group_size))
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=AwqConfig(**options))
    say(model.awq_report.summary())
    say("\nFor comparison, plain rounding to the nearest code, and then the measurements:")
    plain = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=AwqConfig.plain_rounding(**options))

    models = {ORIGINAL: original, PLAIN: plain, OURS: model}
    results = evaluate_many(models, original, EVALUATION, tokenizer, SEQ_LEN, EVALUATION_TOKENS)
    console.print(_table(results, models))
    ours, rounded = results[OURS].kl or 0.0, results[PLAIN].kl or 0.0
    say(EXPLANATION.format(share=ours / max(rounded, 1e-12)))

    save(model, target, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        if not torch.equal(loaded(**prompt).logits, model(**prompt).logits):
            raise RuntimeError(f"the model loaded from {target} does not compute the same logits as the one that was saved")
    say("Saved, and loaded again: the logits are equal to the last bit. How both models\ngo on from the same words:\n")
    for name, each in ((ORIGINAL, original), (OURS, loaded)):
        console.print(f"[bold]{name}[/]", highlight=False)
        say(f"  {_continue(each, tokenizer, prompt)}")
    file = to_gguf(target, target / GGUF_NAME, progress=False).files[0]
    console.print("[bold]awq-hf, in llama.cpp[/]", highlight=False)
    say(f"  {_in_llama_cpp(file, tokenizer) or LLAMA_CPP}")
    say(FAREWELL.format(out=out, report=REPORT_NAME, gguf=GGUF_NAME))


def _table(results: dict[str, Evaluation], models: dict[str, Any]) -> Table:
    first = next(iter(results.values()))
    title = f"{first.tokens:,} tokens of text that neither training nor calibration saw"
    table = Table("", "in memory", "bits/weight", "perplexity", "KL", "same top-1", title=title)
    for name, evaluation in results.items():
        size = models[name].get_memory_footprint(return_buffers=False)
        figures = (f"{evaluation.perplexity:.3f}", f"{evaluation.kl:.4f}", f"{evaluation.top1:.1%}")
        table.add_row(name, f"{size / 1e6:.2f} MB", f"{bits_per_weight(models[name]):.2f}", *figures)
    return table


def _in_llama_cpp(file: Path, tokenizer: Any) -> str | None:
    """How llama.cpp goes on from the same words; None where it is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_gpu_layers, params.verbosity = 256, 0, 0
    answers: list[Any] = []
    request = {"prompt": tokenizer(PROMPT)["input_ids"], "n_predict": NEW_TOKENS, "temperature": 0, "return_tokens": True}
    xllamacpp.Server(params).handle_completions(request, answers.append)
    words = "".join(answer["choices"][0]["text"] for answer in answers)
    return " ".join(f"{PROMPT}{words}".split())


def _continue(model: Any, tokenizer: Any, prompt: Any) -> str:
    ids = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
