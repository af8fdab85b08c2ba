"""How good is a result: hypothesis files, word and character error rates, and the tables that show them."""
