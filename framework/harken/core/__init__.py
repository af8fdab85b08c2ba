"""What everything else stands on: batches, losses, frames, seeded draws, processes, files.

Imports nothing else of harken.
"""
