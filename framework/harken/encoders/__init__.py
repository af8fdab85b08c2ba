"""Frames to representations."""
