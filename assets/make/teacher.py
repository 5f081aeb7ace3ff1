"""Fine-tunes all-MiniLM-L6-v2 to say negative or positive.

usage: python teacher.py OUT_DIR [CACHE_DIR]

Writes OUT_DIR/{model.onnx, config.json, tokenizer.json}, a plain export; OUT_DIR/model.safetensors, from which the student learns; and
OUT_DIR/metrics.json.
"""
import json
import pathlib
import sys
import time

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

import common
import data
from export import export

SEED, EPOCHS, BATCH, RATE = 7, 2, 32, 6e-5


def fine_tune(model, encoded, labels, generator):
    steps = EPOCHS * (len(encoded) // BATCH + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    for epoch in range(EPOCHS):
        model.train()
        for chosen in common.shuffled(encoded, BATCH, generator):
            ids, mask = common.padded([encoded[k] for k in chosen])
            loss = torch.nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        yield epoch + 1


def main():
    out = pathlib.Path(sys.argv[1])
    rows = data.load(pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else common.CACHE)
    torch.set_num_threads(common.THREADS)
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    tokenizer = Tokenizer.from_file(str(common.minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(common.MAX_TOKENS)
    part = {split: data.labelled(rows, split) for split in data.SPLITS}
    encoded = {split: common.encode(tokenizer, [r.text for r in part[split]]) for split in part}
    labels = torch.tensor([r.label for r in part["train"]])
    model = transformers.BertForSequenceClassification.from_pretrained(
        common.minilm(), num_labels=len(common.LABELS), attn_implementation="sdpa", **common.NAMES
    )

    started = time.time()
    for epoch in fine_tune(model, encoded["train"], labels, generator):
        validation = common.scores(common.predict(model, encoded["validation"])[0], part["validation"])
        print(f"epoch {epoch}: validation accuracy {validation['accuracy']}, {time.time() - started:.0f} s", flush=True)
    model.save_pretrained(out)
    metrics = {
        "seed": SEED, "epochs": EPOCHS, "training_texts": len(labels), "training_seconds": round(time.time() - started),
        "validation": validation, "test": common.scores(common.predict(model, encoded["test"])[0], part["test"]),
        "probability_of_positive": common.probes(model, tokenizer), "export": export(model, tokenizer, out, "logits"),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
