"""Ask a model many things: in our engine or at an endpoint, from the cache where known, in a budget."""
