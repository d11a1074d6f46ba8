"""What a person writes: schema, graph, fingerprints, overrides, and the library of recipes."""
