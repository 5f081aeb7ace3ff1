"""Writes a model as a plain ONNX folder, as a user's own export would be: nothing of the inside is named or kept as an output.

model.onnx      input_ids, attention_mask, token_type_ids (int64 [batch, sequence]) -> one output, weights in f32
config.json     Hugging Face's, with the labels
tokenizer.json  Hugging Face's, without padding and truncation, which are the caller's

The file is checked against PyTorch before the function returns: other batch sizes and lengths than the example's, padded rows, and the
rows of a batch against the same rows alone.

usage: python export.py CHECKPOINT_DIR OUT_DIR [torchscript|dynamo]     (a classifier that teacher.py saved, exported again)
"""
import pathlib
import sys

import numpy as np
import onnxruntime as ort
import torch
import transformers
from tokenizers import Tokenizer

OPSET = 17
DYNAMO_OPSET = 18  # the lowest that this exporter writes without converting
TOLERANCE = 1e-4
INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
# (rows, tokens, tokens of the last row that are padding)
CHECKS = [(1, 3, 0), (2, 9, 3), (5, 40, 17), (3, 64, 63)]


class Plain(torch.nn.Module):
    """The model with tensors in and one tensor out."""

    def __init__(self, model, output):
        super().__init__()
        self.model, self.output = model, output

    def forward(self, input_ids, attention_mask, token_type_ids):
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids), self.output)


def example(rows, tokens, padding, vocabulary, seed=0):
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    mask[-1, tokens - padding :] = 0
    ids[-1, tokens - padding :] = 0
    types[0, tokens // 2 :] = 1
    return ids, mask, types


def export(model, tokenizer, folder: pathlib.Path, output: str, exporter: str = "torchscript") -> dict:
    """`output` is "logits" or "last_hidden_state"; `exporter` is "torchscript" or "dynamo". Returns what it measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    model.set_attn_implementation("eager")  # matrix products and a softmax, whatever served the training
    plain = Plain(model, output).eval()  # the wrapper too: the exporter puts back the mode that it finds there
    arguments = example(2, 9, 3, model.config.vocab_size)
    if exporter == "dynamo":
        axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        torch.onnx.export(
            plain, arguments, path, input_names=INPUTS, output_names=[output], dynamic_shapes=[axes] * 3,
            opset_version=DYNAMO_OPSET, dynamo=True, external_data=False,
        )
    else:
        axes = {0: "batch", 1: "sequence"}
        torch.onnx.export(
            plain, arguments, path, input_names=INPUTS, output_names=[output], opset_version=OPSET, dynamo=False,
            dynamic_axes={name: axes for name in INPUTS} | {output: axes if output == "last_hidden_state" else {0: "batch"}},
        )
    write_config(model, folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    measured = {"exporter": exporter, "bytes": path.stat().st_size, "largest_difference_from_pytorch": check(plain, path)}
    print(f"{folder}: {measured}", flush=True)
    return measured


def write_config(model, folder: pathlib.Path):
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json")


@torch.no_grad()
def check(plain, path: pathlib.Path) -> float:
    """The largest difference from PyTorch, where the mask is 1; raises when it is above the tolerance."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0

    def run(ids, mask, types):
        feeds = dict(zip(INPUTS, (ids.numpy(), mask.numpy(), types.numpy())))
        return session.run(None, feeds)[0]

    for seed, (rows, tokens, padding) in enumerate(CHECKS):
        ids, mask, types = example(rows, tokens, padding, plain.model.config.vocab_size, seed)
        got, want = run(ids, mask, types), plain(ids, mask, types).numpy()
        live = mask.numpy().astype(bool) if got.ndim == 3 else slice(None)
        worst = max(worst, np.abs(got - want)[live].max())
        real = slice(0, tokens - padding)  # the last row alone, without its padding
        alone, last = run(ids[-1:, real], mask[-1:, real], types[-1:, real])[0], got[-1]
        worst = max(worst, np.abs(alone - (last[real] if got.ndim == 3 else last)).max())
    if worst > TOLERANCE:
        raise SystemExit(f'"{path.name}" differs from PyTorch by {worst:.1e}, more than {TOLERANCE:.0e}')
    return float(f"{worst:.1e}")


if __name__ == "__main__":
    checkpoint = pathlib.Path(sys.argv[1])
    classifier = transformers.BertForSequenceClassification.from_pretrained(checkpoint)
    export(classifier, Tokenizer.from_file(str(checkpoint / "tokenizer.json")), pathlib.Path(sys.argv[2]), "logits", *sys.argv[3:])
