"""The steps of a synthesis, one a file."""
