"""Runs a script with processors passed off as accelerators, which alone accelerate shares a model among: torchrun on_processors.py SCRIPT OPTIONS."""

import os
import runpy
import sys

import torch
from accelerate import DistributedType, PartialState

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_XPU)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
