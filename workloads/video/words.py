"""The text encoder of the toy models: a prompt is a word for each attribute, a word is a row of a fixed table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from saih.errors import SaihError, unknown

FILE = "words.safetensors"
"""Name of the table in a checkpoint folder; a folder that has it needs no other text encoder."""


class WordEmbeddings:
    """A fixed random vector for each word. The empty prompt is all zeros.

    Attributes:
        attributes: the words of each; a prompt has one of each, in this order.
        table_VD: float32 [words, dim].
    """

    def __init__(self, attributes: Sequence[Sequence[str]], table_VD: Tensor) -> None:
        self.attributes = tuple(tuple(words) for words in attributes)
        self.table_VD = table_VD
        self._place = {word: place for place, word in enumerate(self.words)}

    @property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, in the order of the table."""
        return tuple(word for words in self.attributes for word in words)

    @classmethod
    def draw(cls, attributes: Sequence[Sequence[str]], dim: int, seed: int = 0) -> WordEmbeddings:
        """Standard normal vectors."""
        count = sum(len(words) for words in attributes)
        return cls(attributes, torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))

    @classmethod
    def load(cls, folder: Path) -> WordEmbeddings:
        """The table kept in a checkpoint folder."""
        from safetensors import safe_open

        with safe_open(folder / FILE, framework="pt") as file:
            lines = file.metadata()["attributes"].splitlines()
            return cls([line.split() for line in lines], file.get_tensor("table"))

    def save(self, folder: Path) -> None:
        """Write the table into a checkpoint folder."""
        from safetensors.torch import save_file

        lines = "\n".join(" ".join(words) for words in self.attributes)
        save_file({"table": self.table_VD}, folder / FILE, metadata={"attributes": lines})

    def prompt(self, seed: int) -> str:
        """A prompt drawn at random: a word of each attribute."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (words[int(torch.randint(len(words), (), generator=generator))] for words in self.attributes)
        return " ".join(drawn)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """float32 [prompts, attributes, dim]. Raises SaihError for a prompt that is not a word of each attribute."""
        return torch.stack([self._encode(prompt.split()) for prompt in prompts])

    def _encode(self, words: Sequence[str]) -> Tensor:
        if not words:
            return self.table_VD.new_zeros(len(self.attributes), self.table_VD.shape[1])
        if len(words) != len(self.attributes):
            raise SaihError(f"a prompt of this model has {len(self.attributes)} words, or none: {' '.join(words)!r}")
        for word, known in zip(words, self.attributes, strict=True):
            if word not in known:
                raise unknown("word of a prompt", word, known)
        return self.table_VD[[self._place[word] for word in words]]
