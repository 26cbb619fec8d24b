"""Pretrains a language model: `python train.py` needs no argument, no GPU and no download.

The same as `minillm train`.
"""

import sys

from minillm.cli import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
