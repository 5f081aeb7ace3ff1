"""What teacher and student share: batches, evaluation, export."""
import pathlib
import numpy as np
import torch

LABELS = ["negative", "positive"]
MAX_TOKENS = 64


def batches(encodings, targets, size, generator=None):
    """Padded batches; shuffled in pools of similar length when a generator is given."""
    order = np.arange(len(encodings))
    if generator is not None:
        generator.shuffle(order)
        pool = 50 * size
        order = np.concatenate([sorted(order[i : i + pool], key=lambda k: len(encodings[k])) for i in range(0, len(order), pool)])
    starts = list(range(0, len(order), size))
    if generator is not None:
        generator.shuffle(starts)
    for start in starts:
        chosen = order[start : start + size]
        longest = max(len(encodings[k]) for k in chosen)
        ids, mask = np.zeros((len(chosen), longest), np.int64), np.zeros((len(chosen), longest), np.int64)
        for row, k in enumerate(chosen):
            ids[row, : len(encodings[k])], mask[row, : len(encodings[k])] = encodings[k], 1
        yield chosen, torch.from_numpy(ids), torch.from_numpy(mask), None if targets is None else torch.from_numpy(targets[chosen])


@torch.no_grad()
def logits_of(model, encodings, size=64):
    model.eval()
    out = np.zeros((len(encodings), 2), np.float32)
    order = sorted(range(len(encodings)), key=lambda k: len(encodings[k]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        for _, ids, mask, _ in batches([encodings[k] for k in chosen], None, size):
            out[chosen] = model(input_ids=ids, attention_mask=mask).logits.numpy()
    return out


def scores(logits, rows):
    """Accuracy in all and by source, and what guessing the majority gives."""
    truth, guess = np.array([r.label for r in rows]), logits.argmax(1)
    out = {"texts": len(rows), "accuracy": float((truth == guess).mean()), "majority": float(max(truth.mean(), 1 - truth.mean()))}
    for source in sorted({r.source for r in rows}):
        of = np.array([r.source == source for r in rows])
        out[f"accuracy_{source}"] = float((truth[of] == guess[of]).mean())
    return {k: v if k == "texts" else round(v, 4) for k, v in out.items()}


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return out.logits if hasattr(out, "logits") else out.last_hidden_state


def export(model, tokenizer, folder: pathlib.Path, output: str):
    """A plain export, nothing of the inside named; checked against PyTorch on a padded batch."""
    import onnxruntime as ort

    folder.mkdir(parents=True, exist_ok=True)
    model = Logits(model).eval()  # the wrapper too: the exporter puts back the mode that it finds there
    ids = torch.randint(5, model.model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    dynamic = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        model, (ids, mask), folder / "model.onnx", input_names=["input_ids", "attention_mask"], output_names=[output],
        dynamic_axes={"input_ids": dynamic, "attention_mask": dynamic, output: {0: "batch"} if output == "logits" else dynamic}, opset_version=17, dynamo=False,
    )
    model.model.config.architectures = [type(model.model).__name__]
    model.model.config.to_json_file(folder / "config.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        want = model(ids, mask).numpy()
    error = float(np.abs(got - want).max())
    print(f"{folder}: {(folder / 'model.onnx').stat().st_size} bytes, largest difference from PyTorch {error:.1e}")
    assert error < 1e-4
