"""GGUF files of a float model, type by type: ggml's plain quantizer, the same with an importance matrix, our search; and of an AWQ model.

    python -m benchmarks.gguf                                    the demonstration model
    python -m benchmarks.gguf --model DIR --text FILE --group-size 32 --types IQ4_NL Q4_0 Q4_1 Q5_0 Q5_1 Q3_K_M Q4_K_M

Every file is read back by transformers and computes in float32, so that nothing but the weights differs; the importance matrix is what
llama-imatrix computes by default, E[x^2] of the inputs of the float model's blocks. "general": calibrated on the text that comes with the
package, not the model's own.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from awq_hf import export as awq_export
from awq_hf.evaluate import Evaluation
from awq_hf.exporters.gguf.imatrix import read_imatrix, write_imatrix
from awq_hf.to_gguf import to_gguf
from benchmarks.common import Subject, publish, quiet

TYPES = ("Q2_K_M", "Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
MAX_TOKENS = 10_000


class Bench:
    """Writes files of a subject's model, reads them back and compares them with it."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.file = subject, folder / "model.gguf"
        self.original = subject.load()
        tokenizer = AutoTokenizer.from_pretrained(subject.source)
        self.tokenizer = tokenizer if isinstance(tokenizer.backend_tokenizer.model, models.BPE) else _stand_in()

    def written(self, model: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        """The model that the file holds; types of its matrices and size of the file."""
        export = to_gguf(model, self.file, tokenizer=self.tokenizer, overwrite=True, progress=False, **options)
        kinds = Counter(kind.name for kind in export.types.values() if kind.name != "F32").most_common()
        about = {"matrices": ", ".join(f"{n} {kind}" for kind, n in kinds), "MB": self.file.stat().st_size / 1e6}
        return AutoModelForCausalLM.from_pretrained(self.file.parent, gguf_file=self.file.name, dtype=torch.float32), about

    def compare(self, kind: str) -> dict[str, Any]:
        """One type, written in every way."""
        general: dict[str, Any] = dict(calibration=None, tokenizer=str(self.subject.source))
        matrices = {name: self.file.with_name(f"{name}.imatrix") for name in ("own", "general")}
        ways: dict[str, dict[str, Any]] = {
            "plain": dict(search=False),
            "ours": dict(config=self.subject.config()),
            "importance": dict(imatrix=matrices["own"]),
            "ours, general": dict(config=self.subject.config(**general)),
            "importance, general": dict(imatrix=matrices["general"]),
        }
        saves = {"ours": matrices["own"], "ours, general": matrices["general"]}
        found: dict[str, Evaluation] = {}
        for way, options in ways.items():
            if kind == "Q8_0":
                options = dict(search=False)  # it does not use importance, and is not searched
            elif way in saves:
                saves[way].unlink(missing_ok=True)
                options = {**options, "save_imatrix": saves[way]}
            model, about = self.written(self.subject.source, type=kind, **options)
            if "save_imatrix" in options:
                _keep_blocks(saves[way])
            found[way] = self.subject.measure(model, self.original, MAX_TOKENS)
            print(kind, way, found[way].kl, flush=True)
        found = {way: found[way] for way in ("plain", "importance", "ours", "importance, general", "ours, general")}
        row: dict[str, Any] = {"type": kind, **about} | {f"KL {way}": result.kl for way, result in found.items()}
        row |= {"ours / importance": row["KL ours"] / row["KL importance"]}
        row |= {f"top-1 {way}": result.top1 for way, result in found.items()}
        row |= {f"perplexity {way}": result.perplexity for way, result in found.items()}
        return row | {"perplexity float": found["ours"].reference_perplexity, "evaluation tokens": found["ours"].tokens}

    def repacks(self, group_size: int) -> list[dict[str, Any]]:
        """A 4-bit AWQ checkpoint as files that keep its codes, and as one that is quantized again."""
        checkpoint = self.file.with_name("awq")
        self.subject.load(self.subject.config(bits=4, group_size=group_size), dtype="auto").save_pretrained(checkpoint)
        awq = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        files = {"codes kept (auto)": self.written(checkpoint), "bit for bit (exact)": self.written(checkpoint, exact=True)}
        again = files["codes kept (auto)"][1]["matrices"].split()[1].rstrip(",")
        dense = awq_export(checkpoint, "dense", self.file.with_name("dense"), dtype="float32")
        files[f"quantized again ({again})"] = self.written(dense, type=again, search=False)
        rows: list[dict[str, Any]] = []
        for name, (model, about) in files.items():
            to_awq, to_float = (self.subject.measure(model, against, MAX_TOKENS) for against in (awq, self.original))
            row = {"file": name, **about, "KL to the AWQ model": to_awq.kl, "same top-1": to_awq.top1}
            rows.append(row | {"KL to float": to_float.kl, "perplexity": to_float.perplexity, "evaluation tokens": to_float.tokens})
        return rows


def _keep_blocks(file: Path) -> None:
    """llama-imatrix leaves embedding and head out unless it is told otherwise."""
    found = read_imatrix(file)
    write_imatrix(file, replace(found, entries={n: e for n, e in found.entries.items() if n.startswith("blk.")}), overwrite=True)


def _stand_in() -> Any:
    """For a model whose tokenizer GGUF has no algorithm for: a file needs one, and reading its weights back does not."""
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--group-size", type=int, default=128, help="of the AWQ model")
    parser.add_argument("--types", nargs="+", default=TYPES)
    options = parser.parse_args()
    quiet()
    subject = Subject.from_directory(options.model, options.text) if options.model else Subject.packaged()
    subject.dtype = "float32"
    with TemporaryDirectory() as folder:
        bench = Bench(subject, Path(folder))
        rows = bench.repacks(options.group_size)
        publish(f"gguf_awq_{subject.name}", f"{subject.name}: GGUF files of the 4-bit AWQ model", rows)
        rows = [bench.compare(kind) for kind in options.types]
        publish(f"gguf_{subject.name}", f"{subject.name}: GGUF files, 64 x 256 calibration tokens", rows)


if __name__ == "__main__":
    main()
