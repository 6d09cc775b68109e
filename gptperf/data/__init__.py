"""Text to batches: tokenizers, the shard format, preparation, the resumable loader, an n-gram baseline."""
