"""Transducers: the sum over all alignments, the losses made of it, and the networks that score an alignment's arcs."""
