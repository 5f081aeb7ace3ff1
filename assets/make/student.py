"""Distils the teacher into the embedded demo model.

usage: python student.py TEACHER_DIR OUT_DIR [CACHE_DIR]

The student is a BERT of its own small vocabulary (vocabulary.py), 4 layers, 128 wide, 4 heads. It sees the training texts and many more
made of them (augment.py), and learns the teacher's probabilities (KL divergence at temperature 2), the teacher's last hidden state of
[CLS] through a linear map that is thrown away afterwards, and the human label where there is one.

Writes OUT_DIR/{model.onnx, config.json, tokenizer.json, metrics.json}. The weights of the best epoch by validation accuracy are kept; the
test texts are looked at once, at the end.
"""
import copy
import hashlib
import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

import augment
import common
import data
import vocabulary
from export import export

SEED, EPOCHS, BATCH, RATE, TEMPERATURE = 11, 6, 64, 1e-3, 2.0
WIDTH, LAYERS, HEADS, VOCABULARY, POSITIONS = 128, 4, 4, 9000, 128
MADE = 16_000
HINT, HUMAN = 1.0, 0.3  # weights of the hidden state and of the human label beside the teacher's probabilities
UNLABELLED = -1


def new_student(embeddings, positions):
    config = transformers.BertConfig(
        vocab_size=len(embeddings), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=2 * WIDTH,
        max_position_embeddings=POSITIONS, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        num_labels=len(common.LABELS), attn_implementation="sdpa", **common.NAMES,
    )
    model = transformers.BertForSequenceClassification(config)
    own = model.bert.embeddings
    with torch.no_grad():
        own.word_embeddings.weight.copy_(embeddings)
        own.position_embeddings.weight.copy_(positions[:POSITIONS])
        own.token_type_embeddings.weight.zero_()  # both kinds alike: second texts (type 1) are not trained
    return model


class Lesson:
    """What the teacher says of each text, and the human label where there is one."""

    def __init__(self, logits, hidden, labels):
        self.logits, self.labels = logits, torch.tensor(labels)
        self.hidden = (hidden - hidden.mean(0)) / hidden.std(0)

    def loss(self, chosen, logits, hidden):
        soft = (self.logits[chosen] / TEMPERATURE).softmax(-1)
        loss = TEMPERATURE**2 * torch.nn.functional.kl_div((logits / TEMPERATURE).log_softmax(-1), soft, reduction="batchmean")
        loss = loss + HINT * torch.nn.functional.mse_loss(hidden, self.hidden[chosen])
        labels = self.labels[chosen]
        if (labels != UNLABELLED).any():
            loss = loss + HUMAN * torch.nn.functional.cross_entropy(logits, labels, ignore_index=UNLABELLED)
        return loss


def judged(teacher, tokenizer, texts, cache):
    """(logits, hidden state of [CLS]) by the teacher in bfloat16. Half of the work of this script, so it is kept for a next run."""
    weight = teacher.classifier.weight.detach().numpy().tobytes()
    path = cache / f"judged-{hashlib.sha256(weight + chr(10).join(texts).encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        with torch.autocast("cpu", torch.bfloat16):
            torch.save(common.predict(teacher, common.encode(tokenizer, texts)), path)
    return torch.load(path)


def distil(model, encoded, lesson, generator):
    to_teacher = torch.nn.Linear(WIDTH, lesson.hidden.shape[1])
    steps = EPOCHS * (len(encoded) // BATCH + 1)
    parameters = [*model.parameters(), *to_teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for epoch in range(EPOCHS):
        model.train()
        for chosen in common.shuffled(encoded, BATCH, generator):
            ids, mask = common.padded([encoded[k] for k in chosen])
            inside = model.bert(input_ids=ids, attention_mask=mask)
            loss = lesson.loss(chosen, model.classifier(inside.pooler_output), to_teacher(inside.last_hidden_state[:, 0]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        yield epoch + 1


def main():
    folder, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    cache = pathlib.Path(sys.argv[3]) if len(sys.argv) > 3 else common.CACHE
    rows = data.load(cache)
    torch.set_num_threads(common.THREADS)
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    train = [r for r in rows if r.split == "train"]
    held = {split: data.labelled(rows, split) for split in ("validation", "test")}
    texts = [r.text for r in train]

    teacher = transformers.BertForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa")
    full = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer, original = vocabulary.small_tokenizer(full, texts, VOCABULARY)
    for each in (full, tokenizer):
        each.enable_truncation(common.MAX_TOKENS)
    model = new_student(*vocabulary.start_embeddings(teacher, full, original, WIDTH))

    made = augment.Augmenter(texts, full, teacher.bert.embeddings.word_embeddings.weight.detach(), generator).draw(MADE)
    made += sorted(piece for piece in tokenizer.get_vocab() if piece.isalpha())
    labels = [UNLABELLED if r.label is None else r.label for r in train] + [UNLABELLED] * len(made)
    started = time.time()
    lesson = Lesson(*judged(teacher, full, texts + made, cache), labels)
    print(f"{len(labels)} texts judged by the teacher, {time.time() - started:.0f} s", flush=True)

    encoded = common.encode(tokenizer, texts + made)
    inputs = {split: common.encode(tokenizer, [r.text for r in held[split]]) for split in held}
    best, kept = {"accuracy": 0.0}, None
    started = time.time()
    for epoch in distil(model, encoded, lesson, generator):
        validation = common.scores(common.predict(model, inputs["validation"])[0], held["validation"])
        print(f"epoch {epoch}: validation accuracy {validation['accuracy']}, {time.time() - started:.0f} s", flush=True)
        if validation["accuracy"] >= best["accuracy"]:
            best, kept = validation | {"epoch": epoch}, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)

    metrics = {
        "teacher": json.loads((folder / "metrics.json").read_text()),
        "student": {
            "seed": SEED, "epochs": EPOCHS, "training_texts": len(texts), "made_texts": len(made), "training_seconds": round(time.time() - started),
            "layers": LAYERS, "heads": HEADS, "width": WIDTH, "vocabulary": len(original), "positions": POSITIONS,
            "parameters": sum(p.numel() for p in model.parameters()),
            "validation": best, "test": common.scores(common.predict(model, inputs["test"])[0], held["test"]),
            "probability_of_positive": common.probes(model, tokenizer),
        },
    }
    metrics["student"]["export"] = export(model, tokenizer, out, "logits")
    same_ids(encoded, out, texts + made)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics["student"], indent=1))


def same_ids(encoded, out, texts):
    """The file that is shipped gives the ids of the training, by the library and by Hugging Face's wrapper of it."""
    path = str(out / "tokenizer.json")
    shipped, wrapped = Tokenizer.from_file(path), transformers.PreTrainedTokenizerFast(tokenizer_file=path)
    shipped.enable_truncation(common.MAX_TOKENS)
    if common.encode(shipped, texts) != encoded or wrapped(texts, truncation=True, max_length=common.MAX_TOKENS)["input_ids"] != encoded:
        raise SystemExit(f'"{path}" does not give the ids of the training')


if __name__ == "__main__":
    main()
