"""make_card: README.md and plots of a directory that holds a quantized model."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from awq_hf.model_cards.facts import Facts

README = "README.md"
_MARK = re.compile(r"<!-- awq-hf card, sha256 ([0-9a-f]{64}): replaced when the card is made again, as long as nobody edits it -->\s*$")


def make_card(
    directory: str | os.PathLike[str], repo_id: str | None = None, base_model: str | None = None, license: str | None = None
) -> dict[str, bytes]:
    """Path in the repository -> content: README.md, and the plots that it shows.

    repo_id: where the directory will be on the Hub; without it, snippets run beside the directory. base_model: the Hub id of the original,
    over what report.json says. license: an id of the Hub's, over what the original's card says. Both are remembered when the card is made
    again. What nobody measured or wrote down is left out. Raises ValueError for a directory that holds no model, a file in it that cannot
    be read, and a name that is no Hub id.
    """
    from awq_hf.model_cards.facts import gather

    return write_card(gather(directory, repo_id, base_model, license))


def write_card(facts: Facts) -> dict[str, bytes]:
    """make_card() from facts that are gathered already."""
    from awq_hf.model_cards.plots import draw  # these need packages that importing awq_hf does without
    from awq_hf.model_cards.render import render

    plots = draw(facts)
    return {README: _signed(render(facts, plots)).encode(), **plots}


def is_generated(readme: str) -> bool:
    """Whether the text is exactly what make_card wrote, line ends aside."""
    text = readme.replace("\r\n", "\n")
    found = _MARK.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _signed(text: str) -> str:
    return f"{text}<!-- awq-hf card, sha256 {_digest(text)}: replaced when the card is made again, as long as nobody edits it -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
