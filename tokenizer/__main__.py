"""python -m tokenizer train | encode | decode | inspect

Results go to stdout, progress to stderr. Exit codes: 0 done, 2 what the user gave is wrong, 3 a file is damaged,
130 interrupted.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizer.compression import SAMPLES, compression, table
from tokenizer.inputs import decode_utf8, read_texts
from tokenizer.tokenizer import DamagedFile, Tokenizer
from tokenizer.trainer import SAMPLE_CHARACTERS, train


def main(argv: Sequence[str] | None = None, prog: str = "python -m tokenizer") -> int:
    """Runs one command and returns its exit code; never raises for what the user gave."""
    try:
        arguments = _parser(prog).parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or the mistake
        return stop.code if isinstance(stop.code, int) else 2
    try:
        arguments.command(arguments)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail(prog, "interrupted; nothing was written", 130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except DamagedFile as error:
        return _fail(prog, str(error), 3)
    except OSError as error:
        return _fail(prog, f"{error.filename}: {error.strerror}" if error.strerror else str(error), 2)
    except ValueError as error:
        return _fail(prog, str(error), 2)


def _fail(prog: str, message: str, code: int) -> int:
    print(f"{prog}: {message}", file=sys.stderr)
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Train a SentencePiece tokenizer, use it, look into it.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("train", help="train a tokenizer on files")
    command.set_defaults(command=_train)
    command.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help=".txt .md .py .jsonl files, or folders of them",
    )
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--type", choices=["bpe", "unigram", "char"], default="bpe")
    command.add_argument(
        "--vocab-size",
        type=int,
        default=4096,
        metavar="N",
        help="pieces, special tokens included; for char only a limit (4096)",
    )
    command.add_argument("--seed", type=int, default=0, help="chooses the sample where the text exceeds it (0)")
    command.add_argument(
        "--sample-characters",
        type=int,
        default=SAMPLE_CHARACTERS,
        metavar="N",
        help=f"at most so many are held in memory ({SAMPLE_CHARACTERS:,})",
    )
    command.add_argument("--overwrite", action="store_true", help="replace the tokenizer that DIR holds")

    command = commands.add_parser("encode", help="text to ids")
    command.set_defaults(command=_encode)
    command.add_argument("model", type=Path, metavar="MODEL_DIR")
    source = command.add_mutually_exclusive_group()
    source.add_argument("file", type=Path, nargs="?", metavar="FILE", help="default: stdin")
    source.add_argument("--text", metavar="TEXT")

    command = commands.add_parser("decode", help="ids to text, byte for byte")
    command.set_defaults(command=_decode)
    command.add_argument("model", type=Path, metavar="MODEL_DIR")
    command.add_argument("ids", type=int, nargs="*", metavar="ID", help="default: from stdin, separated by white space")

    command = commands.add_parser("inspect", help="what a vocabulary holds and how it compresses")
    command.set_defaults(command=_inspect)
    command.add_argument("model", type=Path, metavar="MODEL_DIR")
    command.add_argument("--input", nargs="+", type=Path, default=[], metavar="FILE", help="compress these texts too")
    return parser


def _train(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if (out / "manifest.json").exists() and not arguments.overwrite:
        raise ValueError(f"{out} holds a tokenizer already; name another folder, or replace it with --overwrite")
    out.mkdir(parents=True, exist_ok=True)  # before the work, so that a folder that cannot be written costs none
    start = time.monotonic()
    skipped: list[str] = []
    tokenizer = train(
        read_texts(arguments.input, skipped.append),
        type=arguments.type,
        vocab_size=arguments.vocab_size,
        seed=arguments.seed,
        sample_characters=arguments.sample_characters,
    )
    tokenizer.save(out)
    for line in skipped:
        print(f"skipped: {line}", file=sys.stderr)
    text = tokenizer.manifest["text"]
    print(
        f"{out}: {tokenizer.type}, {tokenizer.vocab_size:,} pieces, from {text['documents']:,} texts, "
        f"{text['bytes']:,} bytes ({len(skipped)} files skipped), {time.monotonic() - start:.1f} s",
        file=sys.stderr,
    )
    print(tokenizer.hash)


def _encode(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.model)
    if arguments.text is not None:
        text = arguments.text
    elif arguments.file is not None:
        text = decode_utf8(arguments.file.read_bytes(), str(arguments.file))
    else:
        text = decode_utf8(sys.stdin.buffer.read(), "stdin")
    print(*tokenizer.encode(text))


def _decode(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.model)
    ids = arguments.ids or list(_ids(sys.stdin.read()))
    sys.stdout.buffer.write(tokenizer.decode(ids).encode())


def _ids(text: str) -> Iterator[int]:
    for position, word in enumerate(text.split()):
        if not word.isdecimal():
            raise ValueError(f"stdin: {word[:20]!r} at position {position} is no id; give whole numbers")
        yield int(word)


def _inspect(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(arguments.model)
    texts = dict(SAMPLES)
    for path in arguments.input:
        texts[str(path)] = "".join(read_texts([path], lambda line: print(f"skipped: {line}", file=sys.stderr)))
    print(_facts(tokenizer))
    print()
    print(table(compression(tokenizer, texts)))


def _facts(tokenizer: Tokenizer) -> str:
    text, special = tokenizer.manifest["text"], tokenizer.special
    lengths = Counter(len(piece) for piece in tokenizer.token_bytes)
    longest = sorted(tokenizer.token_bytes, key=len, reverse=True)[:20]
    facts = {
        "type": tokenizer.type,
        "vocabulary": f"{tokenizer.vocab_size:,}",
        "hash": tokenizer.hash,
        "trained on": f"{text['documents']:,} texts, {text['characters']:,} characters, {text['bytes']:,} bytes",
        "SentencePiece": tokenizer.manifest["sentencepiece"],
        "special": " ".join(f"{name}={i}" for name, i in special.items() if i not in tokenizer.sentinel_ids),
        "sentinels": f"{len(tokenizer.sentinel_ids)}",
        "bytes per piece": " ".join(f"{length}:{count}" for length, count in sorted(lengths.items())),
        "longest pieces": " ".join(repr(piece.decode(errors="replace")) for piece in longest),
    }
    return "\n".join(f"{name:<17}{value}" for name, value in facts.items())


if __name__ == "__main__":
    sys.exit(main())
