"""SentencePiece: trains, encodes, decodes. Knows nothing of torch.

Lossless: for every valid Unicode string s, `decode(encode(s)) == s` (type `char`: where it knows the characters).
"""

from tokenizer.tokenizer import DamagedFile, StreamDecoder, Tokenizer
from tokenizer.trainer import train

__all__ = ["DamagedFile", "StreamDecoder", "Tokenizer", "train"]
