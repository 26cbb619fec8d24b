"""SentencePiece: trains, encodes, decodes. Knows nothing of torch."""
