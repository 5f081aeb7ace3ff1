"""Draws the small set of held-out texts that is embedded beside the model.

usage: python texts.py OUT_FILE [CACHE_DIR]

Only texts of the test split, which neither teacher nor student was trained or chosen on; as many negative as positive ones of each source.
Tweets are left out: people's own posts are not for shipping. Tab-separated with a header line, no quoting: a text has no tab and no line break.
"""
import pathlib
import sys

import numpy as np

import common
import data

SEED, EACH = 3, 80
SOURCES = ("movie", "product", "editorial")
WORDS = range(4, 31)


def main():
    out = pathlib.Path(sys.argv[1])
    held = data.labelled(data.load(pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else common.CACHE), "test")
    generator = np.random.default_rng(SEED)
    chosen = []
    for source in SOURCES:
        for label in range(len(common.LABELS)):
            those = [r for r in held if r.source == source and r.label == label and len(r.text.split()) in WORDS]
            chosen += [those[k] for k in sorted(generator.choice(len(those), min(EACH, len(those)), replace=False))]
    chosen = [chosen[k] for k in generator.permutation(len(chosen))]
    lines = ["text\tlabel\trating\tsource"] + [f"{r.text}\t{common.LABELS[r.label]}\t{r.rating:.2f}\t{r.source}" for r in chosen]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{out}: {len(chosen)} texts, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
