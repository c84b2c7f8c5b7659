"""Invented text: words of random letters, drawn by Zipf's law, from a seed."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rsotrain.data.rows import BadRow, Position, Row

WORDS_PER_LINE = 12


@dataclass(frozen=True)
class SyntheticShard:
    """``num_documents`` from ``first_document`` on, of the corpus that ``seed`` stands for."""

    num_documents: int
    words_per_document: int
    num_words: int
    seed: int
    first_document: int = 0
    name: str = "data=synthetic"
    size: int = 0
    row_word: str = "row"

    def words(self) -> np.ndarray:
        """The vocabulary: ``num_words`` strings of 1 to 9 letters, the frequent ones shorter."""
        generator = np.random.default_rng([self.seed, 0])
        letters = np.array(list("etaoinshrdlcumwfgypbvkjxqz"))
        longest = 1 + np.minimum(8, np.log2(np.arange(self.num_words) + 2)).astype(int)
        return np.array(["".join(generator.choice(letters, generator.integers(1, n + 1))) for n in longest])

    def rows(
        self, first: int = 0, step: int = 1, position: Position | None = None
    ) -> Iterator[tuple[int, Row | BadRow]]:
        words = self.words()
        weights = 1 / np.arange(1, self.num_words + 1)
        weights /= weights.sum()
        for number in range(first, self.num_documents, step):
            generator = np.random.default_rng([self.seed, 1 + self.first_document + number])
            picked = words[generator.choice(self.num_words, self.words_per_document, p=weights)]
            lines = [" ".join(picked[i : i + WORDS_PER_LINE]) for i in range(0, len(picked), WORDS_PER_LINE)]
            yield number, {"text": "\n".join(lines) + "\n"}
