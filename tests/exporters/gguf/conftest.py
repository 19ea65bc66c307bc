"""A real llama.cpp, tokenizers of the kinds that it knows, and tiny models with them."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Code, numbers, runs of spaces, several scripts, emoji of several code points, and what looks like special tokens.
TEXTS = [
    "Hello world, it's the year 1234567: we'LL see, won't WE?",
    "def f(x):\n    return {'a': [1, 22, 333, 4444]}  # comment\n\n\n\tif x >= 3.14159e-10:\r\n        pass",
    "a  b   c    d     e\t\tf \n g\n\n\nh   ",
    "我想在apple工作1314151天～ 今日は、世界！ 안녕하세요 세계",
    "🚀 (normal) 😶\u200d🌫️ 👩\u200d👩\u200d👧 ✅ naïve café Ünïcödé нещо на Български कान्ति ١٢٣ ½ ²",
    "3 33 333 3333 33333 333333 3333333 3.3 3..3 ------======= '''''' ```` \"\"\"\" ...... !!!!!! ????",
    "<tool> x <|end|> y<|end|><tool>z <|begin|>middle",
    "x",
    "http://example.org/a_b?c=d&e=f#g CamelCaseWords snake_case_words ALLCAPS iPhone McDonald",
]
SPECIAL = ["<unk>", "<|begin|>", "<|end|>", "<pad>"]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


def _finish(tokenizer: Any, add_bos: bool, **options: Any) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    bos = tokenizer.token_to_id("<|begin|>")
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", bos)]
        )
    named = dict(bos_token="<|begin|>", eos_token="<|end|>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **options})


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., Any]:
    """byte_level(steps of its pre-tokenizer as regular expressions, ignore_merges, normalizer): BPE on bytes, as in GPT-2 and since."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

    def build(*steps: str, ignore_merges: bool = False, normalizer: Any = None, add_bos: bool = False, size: int = 480) -> Any:
        tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
        split = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)])
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(TEXTS * 2, trainer)
        tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
        from tokenizers import decoders

        tokenizer.decoder = decoders.ByteLevel()
        return _finish(tokenizer, add_bos)

    return build


@pytest.fixture(scope="session")
def sentencepiece() -> Callable[..., Any]:
    """sentencepiece(prefix, add_bos): BPE on characters with byte fallback, converted from SentencePiece: Llama 2's with a prefix, Gemma's
    without. Merges are all ways to put tokens together, best token first, as transformers lists them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.tokenization_utils_base import generate_merges

    def build(prefix: bool = True, add_bos: bool = True, size: int = 560) -> Any:
        learner = Tokenizer(models.BPE())
        learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
        learner.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=300, show_progress=False))
        words = sorted(learner.get_vocab(), key=learner.get_vocab().get)  # type: ignore[arg-type]
        tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *words][:size]
        vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
        scores = {token: -float(number) for token, number in vocab.items() if number >= len(SPECIAL) + 256}
        merges = generate_merges({token: vocab[token] for token in scores}, scores)
        tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps) if prefix else steps[0]
        if not prefix:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * prefix
        )
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("▁▁▁▁", normalized=False)])
        return _finish(tokenizer, add_bos, unk_token="<unk>")

    return build


class Runtime:
    """A llama.cpp server in this process."""

    def __init__(self, path: Path, context: int = 256) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_gpu_layers, params.verbosity, params.cpuparams.n_threads = context, 0, 0, 1
        params.warmup = params.fit_params = params.cache_prompt = False
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def post(self, route: str, **body: Any) -> Any:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.server.listening_address + route, data, headers)) as answer:
            return json.load(answer)

    def tokenize(self, text: str) -> list[int]:
        tokens: list[int] = self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return tokens

    def detokenize(self, tokens: list[int]) -> str:
        text: str = self.post("/detokenize", tokens=tokens)["content"]
        return text

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> dict[int, float]:
        """Of the next token. The server reports nothing when it samples a part of a character, so it is made to sample another token."""
        whole = self.tokenize("x")[-1]
        answer = self.post("/completion", prompt=tokens, n_predict=1, n_probs=vocabulary, temperature=0, logit_bias=[[whole, 1000]])
        return {entry["id"]: entry["logprob"] for entry in answer["completion_probabilities"][0]["top_logprobs"]}

    def generate(self, tokens: list[int], n: int) -> list[int]:
        """Tokens, best first."""
        found: list[int] = self.post("/completion", prompt=tokens, n_predict=n, temperature=0, return_tokens=True, ignore_eos=True)[
            "tokens"
        ]
        return found


@pytest.fixture
def runtime() -> Iterator[Callable[..., Runtime]]:
    """runtime(path): llama.cpp with the file loaded."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp, a build of llama.cpp")
    started: list[Runtime] = []

    def start(path: Path, **options: Any) -> Runtime:
        started.append(Runtime(path, **options))
        return started[-1]

    yield start
    started.clear()


@pytest.fixture(scope="session")
def divergence() -> Callable[..., float]:
    """divergence(model, runtime, tokens): KL to llama.cpp's distribution of what follows, the largest over several prefixes."""

    def measure(model: Any, runtime: Runtime, tokens: list[int], lengths: tuple[int, ...] = (1, 5, 17, 40)) -> float:
        worst = 0.0
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        for n in (n for n in (*lengths, len(tokens)) if n <= len(tokens)):
            found = runtime.log_probabilities(tokens[:n], logits.shape[-1])
            numbers = torch.tensor(sorted(found))
            assert len(numbers) > 0.4 * logits.shape[-1]
            mine, theirs = logits[n - 1][numbers], torch.tensor([found[int(number)] for number in numbers]).double()
            rest = (1 - mine.exp().sum()).clamp(min=1e-12), (1 - theirs.exp().sum()).clamp(min=1e-12)
            divergence = float((mine.exp() * (mine - theirs)).sum() + rest[0] * (rest[0] / rest[1]).log())
            assert math.isfinite(divergence)
            worst = max(worst, divergence)
        return worst

    return measure
