"""Runs a script in which the second process alone cannot train on two blocks at once.

torchrun short_of_memory.py SCRIPT OPTIONS
"""

import os
import runpy
import sys

import torch
from transformers import Trainer

train = Trainer.training_step


def training_step(self, model, inputs, *others):
    if os.environ["RANK"] == "1" and len(inputs["input_ids"]) > 1 and self.state.global_step == 2:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    return train(self, model, inputs, *others)


Trainer.training_step = training_step
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
