"""The `minillm` command: finds the command, runs it, and turns its errors into one line and an exit code.

0 done   1 training failed, or problems found   2 what the user gave is wrong   3 a file is damaged
130, 143 stopped by a signal, after saving
"""

import difflib
import errno
import importlib
import os
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
    return run(argv[0], argv[1:]) if argv else run("", [])


def run(command: str, argv: Sequence[str]) -> int:
    """One command, its errors as one line on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed, and the next file opened would get its number
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    if sys.getfilesystemencoding() == "ascii":  # a C locale, in which Python was told not to take UTF-8 instead
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    try:
        try:
            code = _run(command, list(argv))
        except SystemExit:  # a parser's
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a reader that has gone, or a full disk, shows while it can still be said
        return code
    except DamagedFile as error:
        return _say(error, 3)
    except UserError as error:
        return _say(error, 2)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:  # the reader of our output has gone
        _drop_output()
        return 0
    except UnicodeEncodeError as error:
        if error.encoding.replace("-", "").lower() == "utf8":
            raise
        return _say(f"{error.object[error.start]!a} cannot be shown in {error.encoding}; set PYTHONIOENCODING=utf-8", 2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _drop_output()
            further = " and go on with --resume" if command in ("train", "finetune") else ""
            return _say(f"the disk is full ({error.filename or 'while writing'}); make room{further}", 2)
        if error.filename is None:
            raise
        return _say(f"{error.filename}: {error.strerror}", 2)


def _run(command: str, argv: list[str]) -> int:
    for arg in argv:
        if any("\ud800" <= character <= "\udfff" for character in arg):
            raise UserError(f"the argument {arg!a} is not UTF-8; rename the file, or write the text in UTF-8")
    if command in ("", "-h", "--help"):
        print(_usage(), file=sys.stdout if command else sys.stderr)
        return 0 if command else 2
    if command == "--version":
        from minillm import __version__

        print(f"minillm {__version__}")
        return 0
    if command not in COMMANDS:
        raise UserError(_unknown(command))
    if command != "train":
        launching.refuse_group(command)
    if command == "tokenizer":
        return importlib.import_module("tokenizer.__main__").main(argv, prog="minillm tokenizer")
    return importlib.import_module(f"minillm.commands.{MODULES.get(command, command)}").main(argv)


def _usage() -> str:
    lines = [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: minillm COMMAND … (minillm COMMAND --help says more)\n", *lines])


def _drop_output() -> None:
    """What stdout still holds, and could not be written, would fail once more when Python ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
