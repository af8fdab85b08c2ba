"""Learning rate schedules, one a file; built as `cls(config, steps=total)`, it maps steps and hours to a rate."""
