"""`minillm chat MODEL`: a conversation, one line a turn; replies are shown as they are written.

Standard input may also be a pipe: each line of it is a turn of the user, and a line break follows each reply. When the
conversation outgrows the context, its oldest turns are forgotten.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.commands.running import say
from minillm.commands.tasks import opened_means
from minillm.config import UserError
from minillm.inference.generate import generate
from minillm.inference.sampling import Sampling
from minillm.inference.stream import TextStream, stop_and_banned
from minillm.loading import open_model
from minillm.tasks.task import Means
from minillm.training.plan import choose_device


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format; best one finetuned with --task chat."""
    system: str | None = None
    """What stands above the conversation."""
    max_new_tokens: int = 256
    """Of one reply."""
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = 0.95
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm chat", description=__doc__, args=argv)
    sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    opened = open_model(args.model, device=choose_device(args.device))
    model, means = opened.transformer, opened_means(opened)
    if means.config.shape != "decoder" or (opened.config.get("task") or {}).get("head") is not None:
        raise UserError(f"{args.model} does not write replies; chat with a decoder, finetuned with --task chat")
    talk: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    # A tokenizer without roles, or a system message that is too long, is an error before the first line.
    fits([*talk, {"role": "user", "content": "?"}], means)
    if opened.config and (opened.config.get("task") or {}).get("name") not in ("chat", "preference"):
        say("note: this model was not finetuned to reply (minillm finetune MODEL --task chat); expect it to ramble")
    interactive = sys.stdin.isatty()
    if interactive:
        say("one line is one turn; Ctrl-C cuts a reply short, an empty line or Ctrl-D ends the conversation")
    for number, line in enumerate(turns(interactive)):
        try:
            talk, prompt = fits([*talk, {"role": "user", "content": line}], means)
        except UserError as error:
            if not interactive:
                raise
            say(f"error: {error}")  # a person says it again, and what was said before is still there
            continue
        stream = TextStream(means.tokenizer)
        with contextlib.suppress(KeyboardInterrupt) if interactive else contextlib.nullcontext():
            reply(model, means, prompt, stream, sampling, args.max_new_tokens, args.seed + number)
        print(stream.flush(), flush=True)
        talk.append({"role": "assistant", "content": stream.text})
    return 0


def turns(interactive: bool) -> Iterator[str]:
    """The user's lines, without their ends; of a pipe empty ones are left out. Raises `UserError` if not UTF-8."""
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
            line.encode()  # where the locale names no encoding, bytes that are no UTF-8 arrive as lone surrogates
        except UnicodeError:
            raise UserError("standard input is not UTF-8: convert it first, or type the turns by hand") from None
        if not line or (interactive and not line.strip()):
            return
        if line.strip():
            yield line.rstrip("\r\n")


def fits(talk: list[dict[str, str]], means: Means) -> tuple[list[dict[str, str]], list[int]]:
    """(the turns that fit, their ids up to the assistant's header): half of the context stays free for the reply.

    Raises `UserError` where the tokenizer knows no roles, or the last turn alone is too long.
    """
    kept = list(talk)
    while True:
        try:
            ids = means.encode_chat(means.tokenizer, kept, reply=True)[0]
        except ValueError as error:
            raise UserError(f"the conversation cannot be encoded: {error}") from error
        if len(ids) <= max(means.room // 2, 1):
            return kept, ids
        first = 1 if kept[0]["role"] == "system" else 0
        if len(kept) - first >= 3:  # a question and its reply go together
            del kept[first : first + 2]
        elif len(ids) < means.room:
            return kept, ids
        else:
            what = "the system message and this turn have" if first else "this turn has"
            raise UserError(f"{what} {len(ids)} tokens, the model's context {means.room}: say it in fewer words")


def reply(
    model: Any, means: Means, prompt: list[int], stream: TextStream, sampling: Sampling, longest: int, seed: int
) -> None:
    """Writes a reply to stdout, piece by piece, and into `stream`."""
    stops, banned = stop_and_banned(means.tokenizer, means.config)

    def on_token(_: int, token: int) -> None:
        print(stream.push(token), end="", flush=True)

    generate(
        model,
        [prompt],
        max_new_tokens=longest,
        sampling=sampling,
        seed=seed,
        stop_ids=stops,
        banned_ids=banned,
        on_token=on_token,
    )
