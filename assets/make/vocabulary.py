"""The student's vocabulary and where its embeddings begin.

A WordPiece vocabulary needs no training here: the pieces that the teacher's tokenizer makes of the training texts are counted and the
most used are kept, then the most general ones (the teacher's vocabulary is sorted by use) fill up. So a piece of the student is a piece of
the teacher, and the teacher's knowledge of it can be carried over.
"""
import collections
import json

import torch
from tokenizers import Tokenizer

import common

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SPREAD = 0.05  # standard deviation of the embeddings that training begins with


def small_tokenizer(full: Tokenizer, texts: list[str], size: int, least: int = 2):
    """The tokenizer with `size` pieces, and for each piece its id in `full`. Every ASCII character is kept, so that any word can be spelt."""
    ids = full.get_vocab()
    used = collections.Counter(piece for e in full.encode_batch(texts) for piece in e.tokens)
    letters = [p for p in ids if len(p.removeprefix("##")) == 1 and p.isascii()]
    frequent = sorted((p for p in used if used[p] >= least), key=lambda p: (-used[p], ids[p]))
    general = sorted((p for p in ids if p.removeprefix("##").isalpha() and p.isascii()), key=ids.get)
    kept = list(dict.fromkeys(SPECIAL + sorted(letters) + frequent + general))[:size]
    spec = json.loads(full.to_str())
    spec["truncation"], spec["padding"] = None, None
    spec["model"]["vocab"] = {piece: i for i, piece in enumerate(kept)}
    spec["added_tokens"] = [token | {"id": SPECIAL.index(token["content"])} for token in spec["added_tokens"]]
    for name, entry in spec["post_processor"]["special_tokens"].items():
        entry["ids"] = [SPECIAL.index(name)]
    return Tokenizer.from_str(json.dumps(spec)), [ids[piece] for piece in kept]


def start_embeddings(teacher, full: Tokenizer, original: list[int], width: int):
    """(token embeddings, position embeddings) of `width` dimensions.

    A piece begins as the first principal components of two things side by side: the teacher's embedding of it, and what the teacher's last
    layer makes of a text of it alone, which is where its sentiment shows. Positions begin as the teacher's, in the components of the first part.
    """
    words = teacher.bert.embeddings.word_embeddings.weight.detach()[original]
    cls, sep = full.token_to_id("[CLS]"), full.token_to_id("[SEP]")
    _, alone = common.predict(teacher, [[cls, i, sep] for i in original], 512)
    parts = [(x - x.mean(0)) / (x - x.mean(0)).norm() for x in (words, alone)]
    _, _, components = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    components = components[:width].T
    tokens = torch.cat(parts, 1) @ components
    positions = teacher.bert.embeddings.position_embeddings.weight.detach()
    positions = (positions - positions.mean(0)) @ components[: words.shape[1]]
    return tokens / tokens.std() * SPREAD, positions / positions.std() * SPREAD
