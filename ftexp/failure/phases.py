"""Phases of a worker's loop, for the watchdog; messages contain these names."""

from __future__ import annotations

START, STEP, BETWEEN = "in its start", "in a step", "between steps"
AGREEMENT = "in an agreement of all ranks"
EVALUATION, SAVE = "in an evaluation", "waiting for a checkpoint"

WAITED_IN = (STEP, AGREEMENT)  # phases in which ranks wait for one that is stuck elsewhere
