"""Walk the graph of a recipe: skip what is done, resume what was cut off, run the rest."""
