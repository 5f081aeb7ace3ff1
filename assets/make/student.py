"""Distils the teacher into the embedded demo model.

usage: python student.py TEACHER_DIR OUT_DIR [CACHE_DIR]

The student is a BERT of 4 layers, 128 wide, 4 heads. Its WordPiece vocabulary is the part of the teacher's that the training texts use, so
its token embeddings begin as the first principal components of the teacher's. It learns the teacher's probabilities (KL divergence
at temperature 2) on all training texts, labelled or not, on random crops and joins of them, and the human label where there is one.
Writes OUT_DIR/{model.onnx, config.json, tokenizer.json, metrics.json}.
"""
import collections, json, pathlib, sys, time
import numpy as np
import onnxruntime as ort
import torch
import transformers as tf
from tokenizers import Tokenizer

import common, data
from teacher import minilm

SEED, EPOCHS, BATCH, RATE, TEMPERATURE = 11, 16, 64, 1e-3, 2.0
WIDTH, LAYERS, HEADS, VOCABULARY = 128, 4, 4, 9000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def small_tokenizer(texts):
    """The teacher's tokenizer with the most used pieces only; single characters stay, so that any word can be spelt."""
    full = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    full.no_padding(), full.no_truncation()
    used = collections.Counter(p for e in full.encode_batch(texts) for p in e.tokens)
    ids = full.get_vocab()
    letters = [p for p in ids if len(p.removeprefix("##")) == 1 and p.isascii()]
    kept = dict.fromkeys(SPECIAL + sorted(letters))
    for piece, _ in sorted(used.items(), key=lambda kv: (-kv[1], kv[0])):
        if len(kept) == VOCABULARY:
            break
        kept[piece] = None
    spec = json.loads(full.to_str())
    spec["model"]["vocab"] = {p: i for i, p in enumerate(kept)}
    spec["added_tokens"] = [t | {"id": SPECIAL.index(t["content"])} for t in spec["added_tokens"] if t["content"] in SPECIAL]
    for name, entry in spec["post_processor"].get("special_tokens", {}).items():
        entry["ids"] = [SPECIAL.index(name)]
    return Tokenizer.from_str(json.dumps(spec)), [ids[p] for p in kept]


def teacher_logits(session, tokenizer, texts):
    out = np.zeros((len(texts), 2), np.float32)
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    order = sorted(range(len(texts)), key=lambda k: len(encoded[k]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        for _, ids, mask, _ in common.batches([encoded[k] for k in chosen], None, 64):
            out[chosen] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    return out


def augmented(texts, generator, count):
    """Random crops of texts and joins of two halves: unlabelled material for the teacher to judge."""
    words = [t.split() for t in texts]
    out = []
    for _ in range(count):
        w = words[generator.integers(len(words))]
        size = int(generator.integers(2, max(3, min(len(w), 24) + 1)))
        start = int(generator.integers(0, max(1, len(w) - size + 1)))
        piece = w[start : start + size]
        if generator.random() < 0.3:
            other = words[generator.integers(len(words))]
            piece = piece + other[: int(generator.integers(1, 13))]
        out.append(" ".join(piece))
    return out


def main():
    folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    cache = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else pathlib.Path("target/assets")
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    rows = data.load(cache)
    train = [r for r in rows if r.split == "train"]
    held = {s: [r for r in rows if r.split == s and r.label is not None] for s in ("validation", "test")}
    tokenizer, original = small_tokenizer([r.text for r in train])
    tokenizer.enable_truncation(common.MAX_TOKENS)

    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    big = Tokenizer.from_file(str(folder / "tokenizer.json"))
    big.enable_truncation(common.MAX_TOKENS)
    texts = [r.text for r in train]
    extra = augmented(texts, generator, 40_000)
    truth = np.array([-1 if r.label is None else r.label for r in train] + [-1] * len(extra))
    soft = teacher_logits(session, big, texts + extra)
    # Both parts in one array, so that batches carry soft and hard targets together.
    targets = np.concatenate([soft, truth[:, None].astype(np.float32)], axis=1)
    encoded = [e.ids for e in tokenizer.encode_batch(texts + extra)]
    teacher_scores = {s: common.scores(teacher_logits(session, big, [r.text for r in held[s]]), held[s]) for s in held}

    names = {"id2label": dict(enumerate(common.LABELS)), "label2id": {n: i for i, n in enumerate(common.LABELS)}}
    config = tf.BertConfig(
        vocab_size=len(original), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        max_position_embeddings=256, type_vocab_size=1, pad_token_id=0, num_labels=2, attn_implementation="eager", **names,
    )
    model = tf.BertForSequenceClassification(config)
    embeddings = tf.BertModel.from_pretrained(minilm()).embeddings.word_embeddings.weight.detach()[original]
    centred = embeddings - embeddings.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    start = u[:, :WIDTH] * s[:WIDTH]
    model.bert.embeddings.word_embeddings.weight.data = start / start.std() * 0.05

    steps = EPOCHS * (len(encoded) // BATCH + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = tf.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    started = time.time()
    for epoch in range(EPOCHS):
        model.train()
        for _, ids, mask, y in common.batches(encoded, targets, BATCH, generator):
            logits = model(input_ids=ids, attention_mask=mask).logits
            wanted, hard = y[:, :2], y[:, 2].long()
            loss = TEMPERATURE**2 * torch.nn.functional.kl_div(
                (logits / TEMPERATURE).log_softmax(-1), (wanted / TEMPERATURE).softmax(-1), reduction="batchmean"
            )
            if (hard >= 0).any():
                loss = loss + 0.3 * torch.nn.functional.cross_entropy(logits, hard, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        encoded_validation = [e.ids for e in tokenizer.encode_batch([r.text for r in held["validation"]])]
        validation = common.scores(common.logits_of(model, encoded_validation), held["validation"])
        print(f"epoch {epoch + 1}: validation accuracy {validation['accuracy']}, {time.time() - started:.0f} s", flush=True)

    test = common.scores(common.logits_of(model, [e.ids for e in tokenizer.encode_batch([r.text for r in held["test"]])]), held["test"])
    metrics = {"seed": SEED, "epochs": EPOCHS, "student": {"validation": validation, "test": test}, "teacher": teacher_scores}
    print(json.dumps(metrics, indent=1))
    for text in ["This movie was fantastic!", "This movie was not good at all.", "The food was cold and the waiter rude.", "I would happily watch it again."]:
        p = torch.softmax(torch.from_numpy(common.logits_of(model, [tokenizer.encode(text).ids])), -1)[0, 1]
        print(f"{float(p):.3f} positive: {text}")
    common.export(model, tokenizer, out, "logits")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
