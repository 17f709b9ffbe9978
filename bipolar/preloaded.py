"""What a sweep's workers have imported before they start (`bipolar.workers`). Not to be imported by anything else."""

# ruff: noqa: F401
import atexit
import gc

import filelock
import torch._dynamo  # which the first optimizer imports

import bipolar.build
import bipolar.checkpoint
import bipolar.data.streams
import bipolar.ensemble
import bipolar.environment
import bipolar.initialization
import bipolar.recording.loggers
import bipolar.run
import bipolar.trainer

# Spares the workers a fifth of a second each time that they collect garbage, and keeps these pages shared. Undone where
# this process ends, or compiled libraries would complain of leaks; its forks end without ado.
gc.collect()
gc.freeze()
atexit.register(gc.unfreeze)
