"""Phases of a worker's loop, for the watchdog and in the words that users read."""

from __future__ import annotations

START, STEP, BETWEEN = "in its start", "in a step", "between steps"
AGREEMENT = "in an agreement of all ranks"
EVALUATION, SAVE = "in an evaluation", "waiting for a checkpoint"

WAITED_IN = (STEP, AGREEMENT)  # where ranks wait for one that makes no progress elsewhere
