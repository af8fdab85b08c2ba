"""What masked prediction predicts: clusterers and the packed store of their labels."""
