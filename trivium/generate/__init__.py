"""The one engine that generates: cache, batching, sampling, context management."""
