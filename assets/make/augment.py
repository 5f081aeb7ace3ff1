"""More text for the teacher to judge: what the student sees beside the rated snippets.

Nobody labels these, so they need not be good English; they need to say what the teacher does with a word, a negation, a contrast. Four
kinds, drawn at random: a crop of a text; a text with some words replaced by near ones (nearest in the teacher's word embeddings, so that
words come in that the snippets never use); either with a modifier put before a word; two crops joined. And each whole word of the student's vocabulary once, alone.
"""
import numpy as np
import torch
from tokenizers import Tokenizer

NEAREST = 12
REPLACED = 0.3  # share of the words in a text with replacements
MODIFIERS = ["not", "not", "never", "no", "hardly", "very", "really", "too", "so", "not very", "not at all", "isn't", "wasn't", "don't", "less", "without"]
JOINTS = [" ", ". ", ", but ", ", and ", ", yet ", "; "]
LONGEST = 28  # words in a crop


class Augmenter:
    def __init__(self, texts, tokenizer: Tokenizer, embeddings: torch.Tensor, generator: np.random.Generator):
        self.texts = [text.split() for text in texts]
        self.generator = generator
        self.near = neighbours(tokenizer, embeddings)

    def draw(self, count: int) -> list[str]:
        return [self.one() for _ in range(count)]

    def one(self) -> str:
        if self.generator.random() < 0.2:
            return self.crop() + self.pick(JOINTS) + self.crop()
        return self.crop()

    def crop(self) -> str:
        words = self.texts[self.generator.integers(len(self.texts))]
        if self.generator.random() < 0.6:
            size = int(self.generator.integers(min(2, len(words)), min(len(words), LONGEST) + 1))
            start = int(self.generator.integers(0, len(words) - size + 1))
            words = words[start : start + size]
        if self.generator.random() < 0.7:
            words = [self.pick(self.near[w.lower()]) if w.lower() in self.near and self.generator.random() < REPLACED else w for w in words]
        if self.generator.random() < 0.2:
            at = int(self.generator.integers(len(words)))
            words = words[:at] + [self.pick(MODIFIERS)] + words[at:]
        return " ".join(words)

    def pick(self, choices):
        return choices[self.generator.integers(len(choices))]


def neighbours(tokenizer: Tokenizer, embeddings: torch.Tensor) -> dict[str, list[str]]:
    """For each whole word of the teacher's vocabulary the words nearest to it by cosine."""
    whole = [(word, i) for word, i in sorted(tokenizer.get_vocab().items()) if word.isascii() and word.isalpha() and len(word) > 2]
    vectors = torch.nn.functional.normalize(embeddings[[i for _, i in whole]], dim=-1)
    out = {}
    for start in range(0, len(whole), 1024):
        nearest = (vectors[start : start + 1024] @ vectors.T).topk(NEAREST + 1).indices[:, 1:]
        for row, ((word, _), near) in enumerate(zip(whole[start : start + 1024], nearest.tolist())):
            out[word] = [whole[k][0] for k in near]
    return out
