"""The licence of a card: what its publisher says, or else the original's. Keys are those of the card's header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from awq_hf.model_cards.markdown import one_line
from awq_hf.wording import option

OTHER = "other"  # the Hub's id of licences that it has none for
FILES = ("LICENSE", "LICENSE.md")  # where the Hub looks for the text of these
IDS = "https://huggingface.co/docs/hub/repositories-licenses"


def check_licence(license: str | None) -> str | None:
    """The id as the Hub writes it. It keeps its list to itself, and checks against it what is pushed.

    Raises ValueError for what cannot be an id.
    """
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", license):
        raise ValueError(
            f"{option('license', license)} is not the id of a licence; give one of the Hub's, such as apache-2.0 or llama3.2, or {OTHER}; "
            f"they are listed at {IDS}"
        )
    return None if license is None else license.lower()


def licence_of(directory: Path, inherited: dict[str, Any], base_id: str | None, license: str | None) -> dict[str, Any]:
    """inherited: what is known of the original's card. license: an id of the publisher's, which goes first."""
    own = text_of(inherited.get("license"))
    if license is None or license == own:
        found = {"license": own, "license_name": text_of(inherited.get("license_name")), "license_link": _link(inherited, base_id)}
    else:
        text = next((name for name in FILES if (directory / name).is_file()), None) if license == OTHER else None
        found = {"license": license, "license_link": text}
    return {key: value for key, value in found.items() if value is not None}


def text_of(value: Any) -> str | None:
    return (one_line(value) or None) if isinstance(value, str) else None


def _link(inherited: dict[str, Any], base_id: str | None) -> str | None:
    link = text_of(inherited.get("license_link"))
    if link is None or re.match(r"https?://", link):
        return link
    # a file beside the original
    return f"https://huggingface.co/{base_id}/blob/main/{quote(link)}" if base_id and re.fullmatch(r"[\w./-]+", link) else None
