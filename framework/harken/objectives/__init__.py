"""One file for each loss that a model is trained with."""
