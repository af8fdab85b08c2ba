"""From log-probabilities to token ids: CTC best path, and prefix beam search with or without an n-gram model."""
