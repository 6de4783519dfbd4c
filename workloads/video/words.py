"""The text encoder of the toy models: a prompt is words, a word is a row of a fixed table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from saih.errors import SaihError, unknown

FILE = "words.safetensors"
"""Name of the table in a checkpoint folder; a folder that has it needs no other text encoder."""


class WordEmbeddings:
    """A vocabulary and a fixed random vector for each word. The empty prompt is all zeros.

    Attributes:
        words: the vocabulary.
        length: words of a prompt; an embedded prompt is float32 [length, dim].
    """

    def __init__(self, words: Sequence[str], table_VD: Tensor, length: int) -> None:
        self.words, self.length = tuple(words), length
        self._table_VD = table_VD
        self._place = {word: place for place, word in enumerate(self.words)}

    @classmethod
    def draw(cls, words: Sequence[str], dim: int, length: int, seed: int = 0) -> WordEmbeddings:
        """Standard normal vectors."""
        return cls(words, torch.randn(len(words), dim, generator=torch.Generator().manual_seed(seed)), length)

    @classmethod
    def load(cls, folder: Path) -> WordEmbeddings:
        """The table kept in a checkpoint folder."""
        from safetensors import safe_open

        with safe_open(folder / FILE, framework="pt") as file:
            told = file.metadata()
            return cls(told["words"].split(), file.get_tensor("table"), int(told["length"]))

    def save(self, folder: Path) -> None:
        """Write the table into a checkpoint folder."""
        from safetensors.torch import save_file

        told = {"words": " ".join(self.words), "length": str(self.length)}
        save_file({"table": self._table_VD}, folder / FILE, metadata=told)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """float32 [prompts, length, dim]. Raises SaihError for a word that is not in the vocabulary."""
        return torch.stack([self._encode(prompt.split()) for prompt in prompts])

    def _encode(self, words: Sequence[str]) -> Tensor:
        embedded_LD = self._table_VD.new_zeros(self.length, self._table_VD.shape[1])
        if not words:
            return embedded_LD
        if len(words) != self.length:
            raise SaihError(f"a prompt of this model has {self.length} words, or none: {' '.join(words)!r}")
        for word in words:
            if word not in self._place:
                raise unknown("word of a prompt", word, self.words)
        return self._table_VD[[self._place[word] for word in words]]
