"""Slurm: jobs that are written, watched over, requeued and told about."""
