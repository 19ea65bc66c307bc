"""The GGUF target: one file (or shards of it) that llama.cpp runs, with the tokenizer inside."""

from awq_hf.exporters.gguf.writer import export

__all__ = ["export"]
