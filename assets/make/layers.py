"""Which layer of all-MiniLM-L6-v2 knows what: the sentiment of the human-rated snippets, and whether a snippet is longer than most.

usage: python layers.py INTROSPECTD MODEL_DIR OUT_DIR [CACHE_DIR]

MODEL_DIR is what minilm.py exported. Two trainings by `introspectd probe train`, on the same texts: a seeded draw of the train split to learn
from, the whole test split to judge by, so that no document has sentences on both sides. OUT_DIR gets a picture and the numbers of each.
"""
import csv
import json
import pathlib
import subprocess
import sys

import numpy as np

import data

SEED, EXAMPLES = 3, 4000
LABELS = ["negative", "positive"]


def main():
    binary, model, out = sys.argv[1], pathlib.Path(sys.argv[2]).resolve(), pathlib.Path(sys.argv[3])
    cache = pathlib.Path(sys.argv[4] if len(sys.argv) > 4 else "target/assets")
    rows = data.load(cache)
    known, held = data.labelled(rows, "train"), data.labelled(rows, "test")
    generator = np.random.default_rng(SEED)
    known = [known[k] for k in sorted(generator.choice(len(known), EXAMPLES, replace=False))]
    middle = float(np.median([len(data.words(r.text)) for r in known]))
    questions = {
        "sentiment": lambda r: LABELS[r.label],
        "length": lambda r: "long" if len(data.words(r.text)) > middle else "short",
    }
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(known)} texts to learn from, {len(held)} to judge by; long is more than {middle:.0f} words")
    for name, label in questions.items():
        table = cache / f"layers-{name}.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "split"])
            writer.writerows([r.text, label(r), part] for part, those in (("train", known), ("test", held)) for r in those)
        for suffix in (".png", ".json"):
            command = [binary, "probe", "train", model.name, "--models", str(model.parent), "--data", str(table)]
            command += ["--codelength", "-o", str(out / (name + suffix))]
            subprocess.run(command, check=True, capture_output=True)
        print(f"\n{name}\n\n| hook point | accuracy (95 %) | control task | selectivity | compression |\n|---|---|---|---|---|")
        for r in json.loads((out / f"{name}.json").read_text())["reports"]:
            low, high = r["accuracy_interval"]
            row = f"| `{r['hook']}` | {r['accuracy']:.3f} ({low:.3f} to {high:.3f}) | {r['control_accuracy']:.3f} "
            print(row + f"| {r['selectivity']:.3f} | {r['compression']:.2f} |")


if __name__ == "__main__":
    main()
