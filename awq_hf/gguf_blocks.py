"""A GGUF file's weights as transformers reads them, a block at a time: it reads whole files, so it is given one of just those tensors."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter
from torch import Tensor, nn
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from awq_hf.compat import tied_weights
from awq_hf.streaming import Later

VOCABULARY = "tokenizer."  # keys that no weight needs, and that take longer to read than all others
OF_THE_FORMAT = ("GGUF.", "general.architecture", "general.alignment")  # which the writer writes itself
LIST = GGUFValueType.ARRAY


class InGguf(Later):
    """Of a model whose blocks are in a GGUF file."""

    def __init__(self, model: Any, file: Path) -> None:
        """model: of the architecture, on one device, but for its blocks (see `load_float`). Its other weights become the file's at once.

        Raises ValueError for a tensor that the file lacks or has in another shape, here and when a block is loaded.
        """
        super().__init__(model)
        self.reader = GGUFReader(file)
        self.device = model.get_input_embeddings().weight.device
        state, tied = model.state_dict(), tied_weights(model)
        outside = [name for name in state if not name.startswith(f"{self.prefix}.") and name not in tied]
        for name, tensor in self._read("", outside).items():
            state[name].copy_(tensor)  # in place: what is tied stays so

    def fill(self, index: int) -> None:
        names = [f"{self.prefix}.{index}.{name}" for name in self.blocks[index].state_dict()]
        for name, tensor in self._read(f"blk.{index}.", names).items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(owner), leaf, nn.Parameter(tensor.to(self.device), requires_grad=False))

    def _read(self, prefix: str, names: Collection[str]) -> dict[str, Tensor]:
        """float32 tensors by the model's `names`, of those whose names in the file begin with `prefix`; "": those outside of blocks."""
        wanted = [tensor.name for tensor in self.reader.tensors if tensor.name.startswith(prefix or "blk.") == bool(prefix)]
        with TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # where its progress bar is written
            write_excerpt(self.reader, wanted, part := Path(folder, "part.gguf"))
            found = load_gguf_checkpoint(str(part), return_tensors=True, model_to_load=_Names(self.model.config, names))["tensors"]
        state = self.model.state_dict()
        for name in names:
            if name not in found or found[name].shape != state[name].shape:
                raise ValueError(f"{name} is not in the file, or of another shape")
        return {name: found[name] for name in names}


class _Names:
    """What transformers asks of a model to find the names of its tensors, which of all of them takes seconds. names: those wanted."""

    def __init__(self, config: Any, names: Collection[str]) -> None:
        self.config, self.names = config, names

    def state_dict(self) -> Collection[str]:
        return self.names

    def named_children(self) -> list[tuple[str, _Names]]:
        children: dict[str, list[str]] = {}
        for name in self.names:
            child, _, rest = name.partition(".")
            children.setdefault(child, []).append(rest)
        return [(child, _Names(self.config, rest)) for child, rest in children.items() if rest != [""]]


def write_excerpt(reader: GGUFReader, names: Collection[str], path: Path) -> None:
    """A GGUF file with some of another's tensors, as they are, and its metadata but for the tokenizer."""
    sized = any(key.endswith(".vocab_size") for key in reader.fields)  # else the vocabulary is counted
    writer = GGUFWriter(path, arch=reader.fields["general.architecture"].contents(), endianess=reader.endianess)
    for key, field in reader.fields.items():
        if not key.startswith((*OF_THE_FORMAT, VOCABULARY) if sized else OF_THE_FORMAT):
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if field.types[0] == LIST else None)
    for tensor in reader.tensors:
        if tensor.name in names:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
