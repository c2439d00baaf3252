"""Block lists against own attention over every key, in the same run."""

import torch

import fastattn as fa
from benchmarks.registry import Case, Problem, faster_than, time_at_most
from fastattn import testing

BF16, FP32 = torch.bfloat16, torch.float32
CHECKED_ROWS = 16
BOTH = "forward+backward"
