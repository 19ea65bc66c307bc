"""How the demonstration model was trained: two runs on 2 CPU cores (45 and 25 minutes), bf16 autocast, random 256-token windows.

usage: train_demo.py TEXT SECONDS OUT_DIR [START_DIR]
TEXT is a plain text file; tokenizer and weights are written to OUT_DIR; the second run starts from the first one's OUT_DIR.
"""

import math
import pathlib
import sys
import time

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

text, seconds, out = pathlib.Path(sys.argv[1]).read_text(), float(sys.argv[2]), sys.argv[3]
start = sys.argv[4] if len(sys.argv) > 4 else None
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

if start:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
else:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet))
    pair = "<|begin_of_text|> $A $B"
    bpe.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair=pair, special_tokens=[(special[0], 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=special[0],
        eos_token=special[1],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
tokenizer.save_pretrained(out)
ids = torch.tensor(tokenizer(text).input_ids)

torch.manual_seed(0)
if start:
    model, peak = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32), 1.6e-3
else:
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model, peak = LlamaForCausalLM(config), 3e-3
    for layer in model.model.layers:
        for w in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
            w.data.mul_(1 / math.sqrt(8))
T, B = 256, 12
decay = [p for p in model.parameters() if p.ndim >= 2]
rest = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
net, begin, step = torch.compile(model), time.time(), 0
while (done := (time.time() - begin) / seconds) < 1:
    at = torch.randint(0, len(ids) - T - 1, (B,))
    x, y = torch.stack([ids[i : i + T] for i in at]), torch.stack([ids[i + 1 : i + T + 1] for i in at])
    for group in optimizer.param_groups:
        group["lr"] = peak * min(1, (step + 1) / 150) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(input_ids=x, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().view(-1, logits.shape[-1]), y.reshape(-1))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    step += 1
    if step % 100 == 0:
        print(f"step {step} {done:.0%} loss {loss.item():.3f}", flush=True)
model.to(torch.bfloat16).save_pretrained(out)
