"""Optimisers, one a file; each is built as `cls(config, groups=parameter_groups)` and is a torch optimiser."""
