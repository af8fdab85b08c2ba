"""Optimisers, schedules, parameter groups and weight averages."""
