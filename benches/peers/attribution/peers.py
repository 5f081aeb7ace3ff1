"""The models that are compared, as PyTorch has them and as folders for the daemon."""
import dataclasses
import os
import pathlib

import torch
import transformers

INPUTS = ["input_ids", "attention_mask", "token_type_ids"]
PAD = 0
TARGET = 1


@dataclasses.dataclass
class Peer:
    """A classifier. `model` is PyTorch's, with the attention that PyTorch is fastest with."""

    name: str
    folder: pathlib.Path
    model: torch.nn.Module

    def ids(self, tokens, seed=0):
        """A row of so many tokens, and its baseline: padding between the first and the last."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1000, self.model.config.vocab_size - 1, (1, tokens), generator=generator)
        baseline = torch.full_like(ids, PAD)
        baseline[:, [0, -1]] = ids[:, [0, -1]]
        return ids, baseline

    def of_ids(self, ids):
        return self.model(input_ids=ids).logits[:, TARGET]

    def of_embeds(self, x):
        return self.model(inputs_embeds=x).logits[:, TARGET]


def prepared(model):
    for p in model.parameters():
        p.requires_grad_(False)
    return model.eval()


def base(work):
    """BERT-base by its shape, random weights; exported at the first use."""
    torch.manual_seed(0)
    config = transformers.BertConfig(num_labels=2, initializer_range=0.04)  # wide enough that tokens matter
    model = prepared(transformers.BertForSequenceClassification._from_config(config, attn_implementation="sdpa"))
    folder = work / "models" / "base"
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        export(model, folder)
        (folder / "done").touch()
    return Peer("base", folder, model)


class Plain(torch.nn.Module):
    """Tensors in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


def export(model, folder):
    ids = torch.randint(1000, 2000, (2, 9))
    axes = {name: {0: "batch", 1: "sequence"} for name in INPUTS} | {"logits": {0: "batch"}}
    model.set_attn_implementation("eager")
    example = (ids, torch.ones_like(ids), torch.zeros_like(ids))
    torch.onnx.export(
        Plain(model).eval(), example, folder / "model.onnx", input_names=INPUTS, output_names=["logits"], dynamic_axes=axes,
        opset_version=17, dynamo=False,
    )
    model.set_attn_implementation("sdpa")
    model.config.architectures = [type(model).__name__]
    model.config.to_json_file(folder / "config.json")


def teacher():
    """The classifier that INTROSPECTD_BENCH_CLASSIFIER names, if any."""
    named = os.environ.get("INTROSPECTD_BENCH_CLASSIFIER")
    if not named:
        return None
    folder = pathlib.Path(named)
    if not (folder / "model.safetensors").is_file():
        raise SystemExit(f'there is no model.safetensors in "{folder}": assets/README.md tells how the teacher is made')
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa")
    return Peer("teacher", folder, prepared(model))
