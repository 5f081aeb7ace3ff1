"""Exports all-MiniLM-L6-v2 itself, plainly, for benches and comparisons: the encoder, with last_hidden_state as its one output.

usage: python minilm.py OUT_DIR [torchscript|dynamo]
"""
import pathlib
import sys

import transformers
from tokenizers import Tokenizer

import common
from export import export

if __name__ == "__main__":
    encoder = transformers.BertModel.from_pretrained(common.minilm(), add_pooling_layer=False)
    tokenizer = Tokenizer.from_file(str(common.minilm() / "tokenizer.json"))
    export(encoder, tokenizer, pathlib.Path(sys.argv[1]), "last_hidden_state", *sys.argv[2:])
