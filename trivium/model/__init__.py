"""The transformer and everything done to weights: families, positions, adapters, growth, quantisation."""
