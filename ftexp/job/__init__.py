"""The state of one worker."""
