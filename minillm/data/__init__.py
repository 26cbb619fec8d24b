"""From text to batches: sources, cleaning, shards, the order of samples, and what is to be predicted."""
