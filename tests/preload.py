"""Imports what a training or an evaluation imports late; for the process from which `support` forks ranks."""

import PIL.Image

import training.eval.diagnostics
import training.eval.rerank
import training.eval.run
import training.eval.zero_shot
import training.train.run  # noqa: F401
from support import SMALL_LOTLIP
from training import create_model, get_tokenizer

PIL.Image.init()
create_model(SMALL_LOTLIP[1])
get_tokenizer(SMALL_LOTLIP[1])("a text")
