"""The `minillm` command: finds the command, runs it, and turns its errors into one line and an exit code.

0 done   1 training failed, or problems found   2 what the user gave is wrong   3 a file is damaged
130, 143 stopped by a signal, after saving
"""

import difflib
import errno
import importlib
import sys
from collections.abc import Sequence

from minillm.commands import launching
from minillm.config import DamagedFile, UserError

COMMANDS = {
    "train": "pretrain a model from scratch, or go on with a run",
    "tokenizer": "train, encode, decode, inspect",
    "data": "prepare, clean, verify, download",
    "finetune": "adapt a model to a task",
    "evaluate": "loss and metrics on labelled examples",
    "predict": "labels, spans, answers, texts: a line of JSON for each input",
    "embed": "a vector for each text",
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "inspect": "the inside of a model on one text, as one page",
    "import": "a model in Hugging Face's format becomes a run folder",
    "export": "a model as a folder that Transformers, or PEFT, opens",
    "plot": "curves of one or more runs",
    "doctor": "what this machine will use; what is wrong with a run",
}
MODULES = {"import": "importing", "export": "exporting"}
"""Commands whose names no module can have, or should not."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `minillm ARGV`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minillm COMMAND … (minillm COMMAND --help says more)\n", file=sys.stdout if argv else sys.stderr)
        for name, what in COMMANDS.items():
            print(f"  {name:<10} {what}", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        from minillm import __version__

        print(f"minillm {__version__}")
        return 0
    return run(argv[0], argv[1:])


def run(command: str, argv: Sequence[str]) -> int:
    """One command, its errors as one line on stderr."""
    try:
        if command not in COMMANDS:
            raise UserError(_unknown(command))
        if command != "train":
            launching.refuse_group(command)
        if command == "tokenizer":
            tokenizer_main = importlib.import_module("tokenizer.__main__").main
            return tokenizer_main(list(argv), prog="minillm tokenizer")
        return importlib.import_module(f"minillm.commands.{MODULES.get(command, command)}").main(list(argv))
    except DamagedFile as error:
        return _say(error, 3)
    except UserError as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _say(f"the disk is full ({error.filename or 'while writing'}); make room and go on with --resume", 2)
        if error.filename is None:
            raise
        return _say(f"{error.filename}: {error.strerror}", 2)


def _unknown(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    return (
        f"unknown command {command}; "
        + (f"did you mean {near[0]}? " if near else "")
        + f"There are: {', '.join(COMMANDS)}"
    )


def _say(error: object, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
