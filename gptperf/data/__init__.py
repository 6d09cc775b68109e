"""From text to batches: sources, tokenizers, the shard format, preparation, the loader, and an n-gram baseline."""
