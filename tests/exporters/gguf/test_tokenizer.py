"""Tokenizers through a real llama.cpp: the same tokens for hard text; and what cannot be the same is refused."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from awq_hf.exporters.checkpoint import Checkpoint
from awq_hf.exporters.gguf import export
from awq_hf.exporters.gguf.pretokenizers import NAMES, WITHOUT_MARKS, find_pre_tokenizer
from awq_hf.exporters.opening import open_checkpoint

ROWS = 600
NAMED = {name: (steps, skips) for steps, names in NAMES.items() for skips, name in names.items()}
# Pieces that pre-tokenizers cut differently, put together at random.
PIECES = [
    *" \n\t\r'_.,!?/\\<>|é我ア가١½²🚀Ǆǅ\u200d\u0301",
    "  ",
    "\r\n",
    "\n\n",
    "'s",
    "'LL",
    "don't",
    "Hello",
    "WORLD",
    "iPhone",
    "x1",
    "42",
    "1234567",
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=24).map("".join)


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[..., Any]) -> Checkpoint:
    return open_checkpoint(tiny_llama(vocab_size=ROWS, num_hidden_layers=1))


def write(checkpoint: Checkpoint, tokenizer: Any, folder: Path, **options: Any) -> Path:
    (file,) = export(checkpoint, folder / "model.gguf", tokenizer=tokenizer, progress=False, **options)
    return file


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def has_marks(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


def edited(tokenizer: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A copy whose tokenizer.json was changed."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    change(content)
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **named)


@pytest.mark.parametrize("name", NAMED)
def test_byte_level_tokens_are_those_of_transformers(
    name: str, byte_level: Any, runtime: Any, texts: list[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    steps, skips = NAMED[name]
    tokenizer = byte_level(*steps, ignore_merges=skips, add_bos=skips)
    assert find_pre_tokenizer(tokenizer.backend_tokenizer) == name
    file = write(checkpoint, tokenizer, tmp_path)
    assert fields(file)["tokenizer.ggml.pre"] == name
    llama = runtime(file)
    known = [text for text in texts if name not in WITHOUT_MARKS or not has_marks(text)]
    assert len(known) > 5
    assert [llama.tokenize(text) for text in known] == [tokenizer(text).input_ids for text in known]
    assert [llama.detokenize(tokenizer(text, add_special_tokens=False).input_ids) for text in texts] == texts

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXT)
    def check(text: str) -> None:
        assume(name not in WITHOUT_MARKS or not has_marks(text))
        assert llama.tokenize(text) == tokenizer(text).input_ids

    check()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_those_of_transformers(
    prefix: bool, sentencepiece: Any, runtime: Any, texts: list[str], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = sentencepiece(prefix)
    file = write(checkpoint, tokenizer, tmp_path)
    assert fields(file)["tokenizer.ggml.model"] == "llama"
    llama = runtime(file)
    assert [llama.tokenize(text) for text in texts] == [tokenizer(text).input_ids for text in texts]
    plain = [text for text in texts if "<" not in text]  # after a special token, a space
    written = [llama.detokenize(tokenizer(text, add_special_tokens=False).input_ids) for text in plain]
    assert written == [" " * prefix + text for text in plain]

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(TEXT)
    def check(text: str) -> None:
        assert llama.tokenize(text) == tokenizer(text).input_ids

    check()


def test_types_ids_flags_and_template(byte_level: Any, sentencepiece: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = byte_level(add_bos=True)
    tokenizer.add_tokens(["<|not called special|>"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    found = fields(write(checkpoint, tokenizer, tmp_path / "bytes"))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    kinds = {token: TokenType(kind) for token, kind in zip(tokens, types, strict=True)}
    assert kinds["<|begin|>"] == kinds["<|not called special|>"] == TokenType.CONTROL
    assert (kinds["<tool>"], kinds["x"], kinds["[PAD599]"]) == (TokenType.USER_DEFINED, TokenType.NORMAL, TokenType.UNUSED)
    assert [len(tokens), tokens[len(tokenizer)], types.count(TokenType.UNUSED)] == [ROWS, f"[PAD{len(tokenizer)}]", ROWS - len(tokenizer)]
    ids = ("bos_token_id", "eos_token_id", "padding_token_id", "add_bos_token", "add_eos_token")
    assert [found[f"tokenizer.ggml.{name}"] for name in ids] == [1, 2, 3, True, False]
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == ("{{ messages }}", "{{ tools }}")

    found = fields(write(checkpoint, sentencepiece(prefix=False, add_bos=False), tmp_path / "pieces"))
    kinds = {token: TokenType(kind) for token, kind in zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True)}
    assert (kinds["<unk>"], kinds["<0x0A>"], kinds["<|end|>"]) == (TokenType.UNKNOWN, TokenType.BYTE, TokenType.CONTROL)
    assert [found[f"tokenizer.ggml.{name}"] for name in ("add_space_prefix", "add_bos_token", "unknown_token_id")] == [False, False, 0]


def test_special_tokens_that_the_tokenizer_does_not_name_are_those_of_the_config(
    byte_level: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    found = fields(write(checkpoint, tokenizer, tmp_path))
    assert [found[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_a_token_of_the_user_that_holds_spaces_is_found_in_text(
    sentencepiece: Any, runtime: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = sentencepiece(prefix=False)
    tokenizer.add_tokens([AddedToken("▁▁▁▁▁▁", normalized=True)])
    llama = runtime(write(checkpoint, tokenizer, tmp_path))
    text = "Hello      world"
    assert llama.tokenize(text) == tokenizer(text).input_ids
    assert tokenizer.convert_tokens_to_ids("▁▁▁▁▁▁") in llama.tokenize(text)


def test_a_byte_may_go_by_its_character(sentencepiece: Any, runtime: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Gemma's tokenizer.json has two names for the tab; transformers keeps one of them."""

    def change(content: dict[str, Any]) -> None:
        vocab = content["model"]["vocab"]
        assert "\t" in vocab
        vocab["spare"] = vocab.pop("<0x09>")

    tokenizer = edited(sentencepiece(), change)
    file = write(checkpoint, tokenizer, tmp_path)
    assert runtime(file).tokenize("a\t\tb") == tokenizer("a\t\tb").input_ids


def test_a_tokenizer_that_differs_can_be_exported_all_the_same(sentencepiece: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = edited(sentencepiece(), _drop_pair)
    assert fields(write(checkpoint, tokenizer, tmp_path, pre_tokenizer="default"))["tokenizer.ggml.model"] == "llama"


def test_metaspace_is_exported_with_a_word_about_where_llama_cpp_differs(
    sentencepiece: Any, runtime: Any, texts: list[str], checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}

    tokenizer = edited(sentencepiece(), change)
    llama = runtime(write(checkpoint, tokenizer, tmp_path))
    assert "a space before text that begins with one and before text after a special token; this" in caplog.text
    plain = [text for text in texts if "<" not in text]
    assert [llama.tokenize(text) for text in plain] == [tokenizer(text).input_ids for text in plain]


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer"])
def test_a_sentencepiece_model_beside_the_weights_is_enough(
    kind: str, tiny_llama: Any, runtime: Any, texts: list[str], tmp_path: Path
) -> None:
    """transformers makes a tokenizer of it; SentencePiece itself is the third that agrees."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece, which transformers reads tokenizer.model with")
    folder = tmp_path / "model"
    tiny_llama(vocab_size=ROWS).save_pretrained(folder)
    options = dict(vocab_size=540, byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity", minloglevel=3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        remove_extra_whitespaces=False,
        **options,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "bos_token": "<s>", "eos_token": "</s>"}))
    llama = runtime(write(open_checkpoint(folder), None, tmp_path))
    found = [llama.tokenize(text) for text in texts]
    assert found == [AutoTokenizer.from_pretrained(folder)(text).input_ids for text in texts]
    assert [llama.detokenize(tokens) for tokens in found] == [" " * (kind == "LlamaTokenizer") + text for text in texts]
    if kind == "LlamaTokenizer":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        assert found == [pieces.encode(text) for text in texts]


def test_whether_merges_are_skipped_matters_only_where_tokens_show_it(byte_level: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A tokenizer that skips them, of a kind that llama.cpp merges: the same as long as merging arrives at every token."""
    content = json.loads(byte_level(*NAMED["qwen2"][0], size=270, ignore_merges=True).backend_tokenizer.to_str())
    assert find_pre_tokenizer(Tokenizer.from_str(json.dumps(content))) == "qwen2"
    content["model"]["merges"].pop()
    unreached = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    with pytest.raises(ValueError, match="ignore_merges is True .* give pre_tokenizer='qwen2'"):
        write(checkpoint, unreached, tmp_path)
    assert fields(write(checkpoint, unreached, tmp_path, pre_tokenizer="qwen2"))["tokenizer.ggml.pre"] == "qwen2"


def test_a_name_that_llama_cpp_may_not_know_is_remarked_on(
    checkpoint: Checkpoint, byte_level: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("qwen2", "nonsense"):
        assert fields(write(checkpoint, byte_level(), tmp_path / name, pre_tokenizer=name))["tokenizer.ggml.pre"] == name
    assert [record.args for record in caplog.records] == [("nonsense",)]


def _drop_pair(content: dict[str, Any]) -> None:
    ways: dict[str, list[int]] = {}
    for number, (left, right) in enumerate(content["model"]["merges"]):
        ways.setdefault(left + right, []).append(number)
    del content["model"]["merges"][next(numbers[1] for numbers in ways.values() if len(numbers) > 1)]


def _mix_pairs(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    number = next(n for n in range(len(merges) - 2) if "".join(merges[n]) == "".join(merges[n + 1]) != "".join(merges[n + 2]))
    merges[number + 1], merges[number + 2] = merges[number + 2], merges[number + 1]


def _punctuation(content: dict[str, Any]) -> None:
    steps = [{"type": "Punctuation", "behavior": "Isolated"}, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _end(content: dict[str, Any]) -> None:
    pad = {"id": "<pad>", "ids": [3], "tokens": ["<pad>"]}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<pad>", "type_id": 0}}]
    content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"<pad>": pad}}


def _no_byte(content: dict[str, Any]) -> None:
    content["model"]["vocab"]["spare"] = content["model"]["vocab"].pop("<0xE6>")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("byte_level", _punctuation, "not known to have this tokenizer's pre-tokenizer: .*Punctuation.*give that name as pre_tokenizer"),
        ("byte_level", _end, "puts nothing but one bos and one eos token around a text"),
        ("byte_level", lambda c: c.update(normalizer={"type": "Lowercase"}), r"normalizes text \(Lowercase\)"),
        ("byte_level", lambda c: c["model"].update(end_of_word_suffix="</w>"), "marks the parts of words"),
        ("byte_level", lambda c: c.update(pre_tokenizer=None), "neither byte-level nor has it byte_fallback"),
        ("sentencepiece", _drop_pair, "does not merge .* but llama.cpp's SentencePiece algorithm would"),
        ("sentencepiece", _mix_pairs, "does not do all of its merges for .* before those for .*give pre_tokenizer='default'"),
        ("sentencepiece", _no_byte, "no token <0xE6>"),
        ("sentencepiece", lambda c: c.update(normalizer={"type": "NFKC"}), "normalizes text by .*NFKC"),
        ("sentencepiece", lambda c: c.update(pre_tokenizer={"type": "Digits", "individual_digits": True}), "splits text by .*Digits"),
    ],
)  # fmt: skip
def test_what_llama_cpp_would_cut_otherwise_is_refused(
    kind: str, change: Any, message: str, request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    tokenizer = edited(request.getfixturevalue(kind)(), change)
    with pytest.raises(ValueError, match=message):
        write(checkpoint, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_of_other_kinds_and_sizes_are_refused(byte_level: Any, tiny_llama: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="of type WordLevel are not exported"):
        write(checkpoint, words, tmp_path / "out")
    with pytest.raises(ValueError, match="object is not a tokenizer of the tokenizers library"):
        write(checkpoint, object(), tmp_path / "out")
    with pytest.raises(ValueError, match="the tokenizer has 481 tokens, the embedding 480 rows: '<tool>' has no embedding"):
        write(open_checkpoint(tiny_llama(vocab_size=480)), byte_level(), tmp_path / "out")
    with pytest.raises(ValueError, match="has no tokenizer that can be read .*copy the original's files there"):
        write(checkpoint, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nfc_is_left_to_the_reader(byte_level: Any, runtime: Any, texts: list[str], checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Qwen's tokenizer composes characters, llama.cpp does not: the same for text that is composed, as nearly all is."""
    tokenizer = byte_level(*NAMED["qwen2"][0], normalizer=normalizers.NFC())
    llama = runtime(write(checkpoint, tokenizer, tmp_path))
    assert [llama.tokenize(text) for text in texts] == [tokenizer(text).input_ids for text in texts]
