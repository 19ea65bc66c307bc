"""What a card leaves out because nobody said or measured it, and how that is changed."""

from __future__ import annotations

import shlex
from pathlib import Path

from awq_hf.model_cards.artifacts import ROOT
from awq_hf.model_cards.facts import FAST_TARGET, Facts
from awq_hf.model_cards.licence import OTHER


def missing(facts: Facts) -> list[tuple[str, str]]:
    """(what a reader would want to know and the card does not say, the command or step that changes this)."""
    found = []
    source = facts.base.id if facts.base and facts.base.id else "MODEL"
    if facts.base and facts.base.id and facts.base.revision:
        source += f"@{facts.base.revision}"
    command = lambda *words: shlex.join(["awq-hf", *words])  # noqa: E731
    repository = ["--repo-id", facts.repo_id] if facts.repo_id else []
    if facts.base is None or facts.base.id is None:
        again = command("card", facts.directory, *repository, "--base-model", "OWNER/NAME")
        found.append(("which model of the Hub this was made from", again))
    if not facts.licence.get("license"):
        again = command("card", facts.directory, *repository, "--license", "ID")
        found.append(("the licence, which no card of the original says", again))
    elif facts.licence["license"] == OTHER and not facts.licence.get("license_name"):
        found.append(("what the licence is called", "write it into README.md, as license_name, with its text in a file LICENSE beside it"))
    if facts.report is None and facts.root is not None:
        found.append(("what was done to the layers", command("quantize", source, "OUT")))
    if facts.root and facts.root.slow and not facts.served_folders:
        again = command("export", FAST_TARGET, facts.directory, str(Path(facts.directory) / FAST_TARGET))
        found.append((f"a form that {' and '.join(facts.root.slow)} run with their fast kernels, as they do not run symmetric AWQ", again))
    if facts.chat_problem:
        again = "mend it in the original's tokenizer and here, for whoever applies it meets the same"
        found.append((f"the prompt format, for the chat template does not take a conversation ({facts.chat_problem})", again))
    unmeasured = [artifact.path for artifact in facts.artifacts if facts.row(artifact) is None]
    if unmeasured:
        files = ", ".join("the checkpoint" if path == ROOT else path for path in unmeasured)
        found.append((f"the quality of {files}", command("eval", facts.directory, "--reference", source, "--save")))
    return found
