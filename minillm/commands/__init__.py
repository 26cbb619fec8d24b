"""One file per `minillm` command: parse, call, print."""
