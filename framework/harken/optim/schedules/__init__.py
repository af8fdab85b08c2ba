"""Learning rate schedules, one a file; each is built as `cls(config, steps=total)` and maps a step to a rate."""
