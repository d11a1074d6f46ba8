"""One file per objective: a packed batch in, a loss sum and its weight out."""
