"""Model cards: facts gathered from a directory's JSON and headers, rendered by templates. Needs no network and reads no tensor."""

from awq_hf.model_cards.card import is_generated, make_card

__all__ = ["is_generated", "make_card"]
