"""`minillm chat MODEL`: a conversation, one line a turn; replies are shown as they are written.

Standard input may also be a pipe: each line of it is a turn of the user, each reply is printed on a line. When the
conversation outgrows the context, its oldest turns are forgotten.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from minillm.commands.tasks import opened_means, say
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
    opened = open_model(args.model, device=choose_device(args.device))
    model, means = opened.transformer, opened_means(opened)
    if means.config.shape != "decoder" or (opened.config.get("task") or {}).get("head") is not None:
        raise UserError(f"{args.model} does not write replies; chat with a decoder, finetuned with --task chat")
    talk: list[dict[str, str]] = [{"role": "system", "content": args.system}] if args.system else []
    # A tokenizer without roles is an error before the first line.
    fits([*talk, {"role": "user", "content": "?"}], means)
    interactive = sys.stdin.isatty()
    if interactive:
        say("one line is one turn; an empty line or Ctrl-D ends the conversation")
    for number, line in enumerate(turns(interactive)):
        talk.append({"role": "user", "content": line})
        talk, prompt = fits(talk, means)
        text = reply(model, means, prompt, sampling, args.max_new_tokens, args.seed + number)
        talk.append({"role": "assistant", "content": text})
    return 0


def turns(interactive: bool) -> Iterator[str]:
    """The user's lines, without their ends; of a pipe empty ones are left out."""
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
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
            raise UserError(f"this turn has {len(ids)} tokens, the model's context {means.room}: say it in fewer words")


def reply(model: Any, means: Means, prompt: list[int], sampling: Sampling, longest: int, seed: int) -> str:
    """Writes a reply to stdout, piece by piece, and returns it."""
    stream = TextStream(means.tokenizer)
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
    print(stream.flush(), flush=True)
    return stream.text
