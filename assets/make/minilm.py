"""Exports all-MiniLM-L6-v2 itself, plainly: input_ids and attention_mask in, last_hidden_state out. For benches.

usage: python minilm.py OUT_DIR
"""
import pathlib, sys
import transformers as tf
from tokenizers import Tokenizer

import common
from teacher import minilm

model = tf.BertModel.from_pretrained(minilm(), attn_implementation="eager", add_pooling_layer=False)
common.export(model, Tokenizer.from_file(str(minilm() / "tokenizer.json")), pathlib.Path(sys.argv[1]), "last_hidden_state")
