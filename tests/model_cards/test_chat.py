"""The prompt format: what the model's own template makes of a conversation, whatever the template takes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from markdown_it import MarkdownIt
from transformers import AutoTokenizer

from awq_hf.model_cards.chat import Template, chat_of
from awq_hf.model_cards.facts import gather
from awq_hf.model_cards.gguf_header import read_header
from awq_hf.model_cards.missing import missing
from awq_hf.model_cards.render import render

from .conftest import CHATML, write_json

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
SILENT = "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
PARTS = "{% for m in messages %}[{{ m.role }}]{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}[assistant]"
DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}Today: {{ date_string }} " + TURNS
ALL = "[user]{prompt}[assistant]{answer}[user]{next prompt}[assistant]"


@pytest.mark.parametrize(
    "template, expected, parts",
    [
        (TURNS, "[system]{system prompt}" + ALL, False),
        (NO_SYSTEM, ALL, False),
        (SILENT, ALL, False),
        (PARTS, "[system]{system prompt}" + ALL, True),
        (DATED, "Today: {date} [system]{system prompt}" + ALL, False),
    ],
)
def test_templates_that_take_other_things(template: str, expected: str, parts: bool) -> None:
    chat = chat_of(Template(template))
    assert (chat.format, chat.parts) == (expected, parts)


def test_it_is_what_the_tokenizer_says(demo_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(demo_dir / "model", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}" + CHATML}]
    (path / "report.json").write_text(json.dumps({"layers": [], "calibration": {}}))  # a float model that was quantized once
    for template in (CHATML, named):
        write_json(path / "tokenizer_config.json", {**config, "chat_template": template})
        messages = [{"role": "system", "content": "{system prompt}"}, {"role": "user", "content": "{prompt}"}]
        messages += [{"role": "assistant", "content": "{answer}"}, {"role": "user", "content": "{next prompt}"}]
        expected = AutoTokenizer.from_pretrained(path).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        chat = gather(path).chat
        assert chat is not None and chat.format == expected and "<|begin_of_text|><|im_start|>system" in expected
    (path / "chat_template.jinja").write_text(TURNS)  # goes before the config's
    chat = gather(path).chat
    assert chat is not None and chat.format == "[system]{system prompt}" + ALL


def test_the_card_shows_it_as_it_is(full: Path) -> None:
    write_json(full / "tokenizer_config.json", {"chat_template": "```\n# no heading\n</details>" + TURNS})
    (block,) = [t for t in MarkdownIt().parse(render(gather(full), ()).split("## Prompt format")[1]) if t.info == "text"]
    assert block.content == "```\n# no heading\n</details>[system]{system prompt}" + ALL + "\n"


def test_a_base_model_has_none(full: Path) -> None:
    write_json(full / "tokenizer_config.json", {"chat_template": None})
    text = render(gather(full, "a/b"), ())
    assert "Prompt format" not in text and "apply_chat_template" not in text
    assert 'tokenizer("The sky is blue because"' in text and "llama-completion -hf a/b:Q6_K -no-cnv -p " in text


@pytest.mark.parametrize(
    "template, reason",
    [("{{ raise_exception('only tools') }}", "only tools"), ("{% for %}", "Expected"), ("constant", "it leaves out the messages")],
)
def test_a_template_that_fails_is_said_and_not_used(template: str, reason: str, full: Path) -> None:
    write_json(full / "tokenizer_config.json", {"chat_template": template})
    facts = gather(full)
    text = render(facts, ())
    assert "Prompt format" not in text and "apply_chat_template" not in text
    ((what, _),) = missing(facts)
    assert what.startswith("the prompt format, for the chat template does not take a conversation") and reason in what


def write_chat_gguf(path: Path, **tokens: int) -> None:
    writer: Any = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(CHATML)
    writer.add_token_list(["<pad>", "<s>", "</s>"])
    for name, number in tokens.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((4, 144), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_alone_have_one(tmp_path: Path) -> None:
    write_chat_gguf(tmp_path / "chat-Q4_K.gguf", bos=1, eos=2)
    assert read_header(tmp_path / "chat-Q4_K.gguf").chat_template == Template(CHATML, {"bos_token": "<s>", "eos_token": "</s>"})
    text = render(gather(tmp_path, "a/b"), ())
    assert "```text\n<s><|im_start|>system\n{system prompt}<|im_end|>\n" in text and "llama-cli --hf-repo a/b" in text
    write_chat_gguf(tmp_path / "chat-Q4_K.gguf", bos=3)
    with pytest.raises(ValueError, match="token 3 is none of its 3"):
        read_header(tmp_path / "chat-Q4_K.gguf")
