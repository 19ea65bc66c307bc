"""The metadata block of a card: what the Hub filters, links and lists by."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from awq_hf.model_cards.artifacts import ROOT
from awq_hf.model_cards.facts import Facts, Measured
from awq_hf.model_cards.licence import text_of
from awq_hf.model_cards.markdown import one_line

_FORMATS = {"awq", "gguf", "gptq", "safetensors", "pytorch", "transformers", "llama.cpp", "compressed-tensors", "autotrain_compatible"}


def card_data(facts: Facts) -> ModelCardData:
    """Languages and task are the original's, or absent. quantized_by: who publishes it."""
    base = facts.base
    inherited = base.metadata if base else {}
    task = text_of(inherited.get("pipeline_tag")) or _task(facts.class_name)
    results = _results(facts, task or "text-generation")
    return ModelCardData(
        base_model=base.id if base else None,
        base_model_relation="quantized" if base and base.id else None,
        **facts.licence,
        language=_languages(inherited.get("language")),
        library_name="transformers" if facts.root else "gguf" if facts.gguf else None,
        pipeline_tag=task,
        tags=_tags(facts, inherited.get("tags")),
        eval_results=results or None,
        model_name=facts.title if results else None,
        quantized_by=facts.repo_id.partition("/")[0] if facts.report and facts.repo_id and "/" in facts.repo_id else None,
    )


def _languages(value: Any) -> str | list[str] | None:
    """YAML 1.1 reads `no`, Norwegian, as false."""
    given = value if isinstance(value, list) else [value]
    named = ["no" if item is False else item for item in given]
    found = [item for item in named if isinstance(item, str) and re.fullmatch(r"[A-Za-z-]{2,20}", item)]
    return (found if isinstance(value, list) else found[0]) if found else None


def _task(class_name: str | None) -> str | None:
    return "text-generation" if (class_name or "").endswith("ForCausalLM") else None


def _tags(facts: Facts, inherited: Any) -> list[str]:
    formats = [artifact.format for artifact in facts.artifacts if artifact.format != "float"]
    widths = sorted({bits for artifact in facts.artifacts for bits in artifact.bits})
    ours = list(dict.fromkeys(["awq"] * (facts.report is not None) + formats + [f"{bits}-bit" for bits in widths]))
    given = inherited if isinstance(inherited, list) else []
    others = [tag for tag in given if isinstance(tag, str) and re.fullmatch(r"[\w.+-]{1,50}", tag) and tag.lower() not in _FORMATS]
    return [*ours, *(tag for tag in dict.fromkeys(others) if tag not in ours and not re.fullmatch(r"\d+-bit", tag))]


def _results(facts: Facts, task: str) -> list[EvalResult]:
    first = {id(row): (row, artifact.path) for artifact in reversed(facts.artifacts) if (row := facts.row(artifact))}
    return [result for row, path in reversed(first.values()) for result in _of_row(row, path, task, facts.is_strange(row.sample))]


def _of_row(row: Measured, path: str, task: str, strange: bool) -> list[EvalResult]:
    """strange: the text is, so its perplexity would be read as a fault of the model's."""
    what = "" if path == ROOT else f", {path}"
    figures = (
        ("perplexity", f"Perplexity{what}", None if strange else row.perplexity),
        ("kl_divergence", f"KL divergence to the original in nats{what}", row.kl),
        ("top1_agreement", f"Same top-1 token as the original{what}", row.top1),
    )
    args = {"tokens": row.tokens, "seq_len": row.seq_len}
    return [
        EvalResult(
            task_type=task,
            dataset_type="text",
            dataset_name=one_line(row.text) or "text",
            dataset_revision=row.sha256 or None,  # texts are told apart by it: the client groups results without regard to names
            dataset_args=args,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, name, value in figures
        if value is not None
    ]
