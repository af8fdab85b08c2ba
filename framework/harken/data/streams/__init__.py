"""Streams: corpora in shards that are only read in order, Lhotse Shar and WebDataset."""
