"""From files to packed rows: sources, token shards, mixtures, packing, batches."""
