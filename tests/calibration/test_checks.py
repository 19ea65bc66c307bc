"""What is said of data that cannot calibrate well, and how it reaches the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

import awq_hf
from awq_hf import AwqConfig, AwqHfQuantizer, hf_quantizer
from awq_hf.calibration import checks
from awq_hf.calibration.checks import check_windows
from awq_hf.calibration.data import Windows, load_windows


class Tokenizer:
    def __init__(self, size: int = 100, unk: int | None = None, bos: int | None = None) -> None:
        self.size, self.unk_token_id, self.bos_token_id = size, unk, bos

    def __len__(self) -> int:
        return self.size


def windows(ids: Any, seq_len: int = 64) -> Windows:
    return load_windows([torch.as_tensor(ids)], None, seq_len)


def varied(count: int) -> Tensor:
    return torch.arange(count) % 90 + 3


def notes(given: Windows, tokenizer: Any = None, asked: int = 2048, vocabulary: int = 100) -> tuple[str, ...]:
    checked = check_windows(given, asked, tokenizer, vocabulary)
    assert torch.equal(checked.input_ids, given.input_ids) and checked.source == given.source
    return checked.notes


def test_nothing_is_said_of_good_data(caplog: pytest.LogCaptureFixture) -> None:
    assert notes(windows(varied(2048)), Tokenizer()) == notes(windows(varied(5000)), None) == ()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("tokens", "asked", "said"),
    [
        (2048, 2048, None),
        (2048, 2049, "holds 2,048 of the 2,049 tokens asked for (samples x seq_len); all of them are used"),
        (2047, 4096, "is only 2,047 tokens; with fewer than 2,048 results may be poor: give more text"),
        (4096, 2047, "is only 2,047 tokens; with fewer than 2,048 results may be poor: raise samples or seq_len"),
        (1000, 500, "is only 500 tokens; with fewer than 2,048 results may be poor: give more text and raise samples or seq_len"),
        (32, 2048, "is only 32 tokens; with fewer than 2,048 results may be poor: give more text"),
    ],
)
def test_fewer_tokens_than_asked_for(tokens: int, asked: int, said: str | None, caplog: pytest.LogCaptureFixture) -> None:
    found = notes(windows(varied(tokens)), Tokenizer(), asked)
    assert found == (() if said is None else (f"calibration (1 token tensors) {said}",))
    assert [(r.name, r.levelname, r.message) for r in caplog.records] == [("awq_hf", "WARNING", note) for note in found]


def test_too_few_tokens_of_a_text_are_refused() -> None:
    with pytest.raises(ValueError, match="holds 31 tokens, too few to say anything; give at least 2,048, some 1,500 words"):
        notes(windows(varied(31)), Tokenizer())
    assert len(notes(windows(varied(31)), None)) == 1, "who gives tokens is only told"


def test_a_small_vocabulary() -> None:
    assert notes(windows(varied(2048)), Tokenizer(100), vocabulary=200) == ()
    (note,) = notes(windows(varied(2048)), Tokenizer(100), vocabulary=201)
    assert "tokenized with 100 token ids, the model has 201: the tokenizer may be another model's" in note


def test_token_ids_that_the_model_does_not_have() -> None:
    with pytest.raises(ValueError, match="token id 33, but the model's vocabulary has 33"):
        notes(windows(varied(31)), Tokenizer(), vocabulary=33)


def with_share(token: int, share: float) -> Tensor:
    ids = varied(4000)
    ids[: round(4000 * share)] = token
    return ids


def test_unknown_tokens() -> None:
    assert notes(windows(with_share(1, 0.05)), Tokenizer(unk=1)) == ()
    (note,) = notes(windows(with_share(1, 0.06)), Tokenizer(unk=1))
    assert "holds 6% unknown tokens: the tokenizer does not know this language" in note
    assert notes(windows(with_share(1, 0.06)), Tokenizer(unk=1, bos=1)) == (), "an id that has another meaning too"
    assert notes(windows(with_share(1, 0.06)), Tokenizer(unk=None)) == notes(windows(with_share(1, 0.06)), None) == ()


def test_padding_of_the_last_window_is_not_counted() -> None:
    assert notes(windows(varied(2049), seq_len=4096), Tokenizer(unk=0)) == ()


def test_one_token_over_and_over() -> None:
    assert notes(windows(with_share(99, 0.48)), Tokenizer()) == ()
    (note,) = notes(windows(with_share(99, 0.52)), Tokenizer())
    assert "is token id 99 for 52%: is it padding, or another model's tokenizer?" in note
    assert len(notes(windows(with_share(99, 0.99)), None)) == 1, "who gives tokens is only told"
    with pytest.raises(ValueError, match="comes to token id 99 for 91%: is it the right text, and the right tokenizer"):
        notes(windows(with_share(99, 0.91)), Tokenizer())


def test_the_tokenizer_of_a_processor_is_meant() -> None:
    assert len(notes(windows(with_share(1, 0.06)), SimpleNamespace(tokenizer=Tokenizer(unk=1)))) == 1


def test_notes_are_added() -> None:
    given = windows(varied(2000))
    twice = check_windows(check_windows(given, 2048, None, 100), 2048, None, 100)
    assert len(twice.notes) == 2 and twice.sample(1, 0).notes == twice.notes


# In the quantizer


@pytest.fixture(scope="module")
def model(demo_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(demo_dir / "model")


def prepared(model: Any, **options: Any) -> Windows:
    quantizer = AwqHfQuantizer(AwqConfig(**options), pre_quantized=False)
    quantizer.prepare(model)
    assert quantizer.windows is not None
    return quantizer.windows


def test_a_word_is_no_calibration(model: Any) -> None:
    with pytest.raises(ValueError, match=r"calibration \(1 texts\) holds . tokens, too few"):
        prepared(model, calibration=["Union"])


def test_notes_reach_the_windows(model: Any, demo_dir: Path) -> None:
    assert prepared(model, calibration=demo_dir / "calibration.txt", samples=8, seq_len=256).notes == ()
    (note,) = prepared(model, calibration=["The state of our Union. " * 40], seq_len=256).notes
    assert "is only 322 tokens" in note


def test_as_many_documents_as_needed_are_drawn_with_the_seed(model: Any, monkeypatch: pytest.MonkeyPatch, demo_dir: Path) -> None:
    from awq_hf.calibration import sources

    monkeypatch.setattr(sources, "SMALL", 1)
    digests = [prepared(model, calibration=demo_dir / "calibration.txt", samples=8, seq_len=64, seed=s).sha256() for s in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    calls: list[Any] = []

    def load(*args: Any, **options: Any) -> Windows:
        calls.append(options)
        return load_windows(*args, **options)

    monkeypatch.setattr(hf_quantizer, "load_windows", load)
    found = prepared(model, calibration=demo_dir / "calibration.txt", samples=8, seq_len=64, seed=1)
    assert calls == [{"samples": 8, "seed": 1}] and len(found.lengths) == 8 and found.sha256() == digests[2]


def test_chats_and_records(model: Any, demo_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = [{"role": "user", "content": "What is the state of our Union?"}, {"role": "assistant", "content": "It is strong."}]
    found = prepared(model, calibration=[chat] * 100, samples=8, seq_len=256, tokenizer=tokenizer)
    assert found.source == "100 conversations" and len(found.lengths) == 8
    assert prepared(model, calibration=[{"text": "The state of our Union. " * 40}] * 10, samples=8, seq_len=256).source == "10 records"
    with pytest.raises(ValueError, match=r"item \d+\) is a conversation, but the tokenizer has no chat template"):
        prepared(model, calibration=[chat] * 100)


@pytest.mark.parametrize("given", ["object", "directory", "path"])
def test_a_processor(given: str, model: Any, demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    processor: Any = transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)
    processor.save_pretrained(tmp_path)

    class NoTokenizer:
        @staticmethod
        def from_pretrained(source: Any, **_options: Any) -> Any:
            raise OSError("no tokenizer.json\nand nothing else")

    monkeypatch.setattr(hf_quantizer, "AutoTokenizer", NoTokenizer)
    passed = {"object": processor, "directory": str(tmp_path), "path": tmp_path}[given]
    options: dict[str, Any] = dict(calibration=["The state of our Union. " * 400], samples=8, seq_len=256)
    found = prepared(model, tokenizer=passed, **options)
    assert found.sha256() == prepared(model, tokenizer=tokenizer, **options).sha256()
    for source in (demo_dir / "model", tmp_path / "nothing"):  # a tokenizer that poses as a processor; nothing at all
        with pytest.raises(ValueError, match=f"no tokenizer was found at '{source}' .*no tokenizer.json.; copy the original"):
            prepared(model, tokenizer=source, **options)


def test_tokens_need_no_tokenizer(tiny_llama: Callable[..., Any], tokens: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hf_quantizer, "AutoTokenizer")
    assert prepared(tiny_llama(), calibration=tokens, seq_len=48, group_size=32).tokens == sum(map(len, tokens))
    assert prepared(tiny_llama(), calibration=torch.stack([tokens[0]] * 9), seq_len=48, group_size=32).tokens == 9 * len(tokens[0])


def test_limits_are_in_order() -> None:
    assert 2 < checks.FEWEST < checks.FEW and 0 < checks.MANY_UNKNOWN < checks.DOMINANT < checks.ALL < 1
    assert awq_hf.AwqConfig().samples * 512 > checks.FEW
