"""`minillm generate MODEL`: continues prompts; text to stdout, the speed to stderr."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from minillm.config import UserError
from minillm.inference.beam import beam_search
from minillm.inference.generate import generate
from minillm.inference.reader import framed, room
from minillm.inference.sampling import Sampling
from minillm.inference.stream import TextStream, stop_and_banned
from minillm.loading import Opened, open_model
from minillm.model.transformer import Transformer
from minillm.training.plan import choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Args:
    model: tyro.conf.Positional[Path]
    """A run folder, a checkpoint folder, or a folder in Hugging Face's format."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What is continued (of an encoder-decoder: what its encoder reads); may be given several times."""
    input: Path | None = None
    """A file of prompts instead: .txt with one a line, or .jsonl with "prompt", "text" or "source"."""
    max_new_tokens: int = 128
    temperature: float | None = None
    """0 is greedy: always the likeliest token. None: 0.8."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float | None = None
    """Only the fewest likeliest tokens that together reach p."""
    min_p: float | None = None
    """Only tokens at least so many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are already in the text become less likely."""
    beams: int = 1
    """Above 1: nothing is drawn, but the likeliest text searched for with so many side by side (beam search)."""
    length_penalty: float = 1.0
    """Of a beam search: its texts are compared by log p / length ** length_penalty."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The text ends before this string; may be given several times."""
    seed: int = 0
    num: int = 1
    """Texts for each prompt."""
    batch: int = 32
    """Texts that are generated side by side."""
    json: bool = False
    """One JSON object a line: prompt, text (without the prompt), tokens, ended (end | stop | length)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of weights and cache. auto: bf16 on a GPU that has it, else fp32."""
    cache: bool = True
    """Keep keys and values; without, everything is read anew for each token."""


def main(argv: list[str]) -> int:
    args = tyro.cli(Args, prog="minillm generate", description=__doc__, args=argv)
    sampling = _sampling(args)
    prompts = [prompt for prompt in _prompts(args) for _ in range(args.num)]
    streams_live = len(prompts) == 1 and not args.json and args.beams == 1 and sys.stdout.isatty()
    device = choose_device(args.device).type
    opened = open_model(args.model)
    model = opened.transformer
    if model.decoder is None:
        raise UserError(f"{args.model} is an encoder: it cannot generate text; take a decoder or an encoder-decoder")
    _place(model, device, args.dtype)
    encoded = [_encode(opened.tokenizer, prompt) for prompt in prompts]
    _warn_of_long_prompts(encoded, opened)

    tokens, start = 0, time.perf_counter()
    rows = max(1, args.batch // args.beams)
    for first in range(0, len(prompts), rows):
        part = slice(first, first + rows)
        texts = _continue(opened, prompts[part], encoded[part], args, sampling, first, streams_live)
        tokens += sum(text.tokens for text in texts)
        for row, text in enumerate(texts, first):
            _print(text, row, args, alone=len(prompts) == 1, shown_already=streams_live)
    print(_speed(tokens, time.perf_counter() - start, model, args.cache), file=sys.stderr)
    return 0


def _sampling(args: Args) -> Sampling:
    """How tokens are drawn. Raises `UserError` for a number that makes no sense, or one that a beam search ignores."""
    for name in ("num", "batch", "beams"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}")
    draws = {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p}
    given = [name for name, value in draws.items() if value is not None]
    given += [name for name in ("repetition_penalty", "num") if getattr(args, name) != 1]
    if args.beams > 1 and given:
        other = given[0].replace("_", "-")
        raise UserError(
            f"--beams looks for the one likeliest text, --{other} is for texts that are drawn: give one only"
        )
    if args.beams == 1 and args.length_penalty != 1.0:
        raise UserError("--length-penalty compares the texts of a beam search: give --beams too, or leave it out")
    temperature = 0.8 if args.temperature is None else args.temperature
    return Sampling(**{**draws, "temperature": temperature}, repetition_penalty=args.repetition_penalty)


@dataclass
class Text:
    """What came of one prompt."""

    prompt: str
    shown_prompt: str  # "" where the prompt is read by an encoder: the text is an answer, no continuation
    stream: TextStream
    tokens: int = 0
    ended: str = "end"


def _continue(
    opened: Opened,
    prompts: list[str],
    encoded: list[list[int]],
    args: Args,
    sampling: Sampling,
    first_row: int,
    streams_live: bool,
) -> list[Text]:
    model, tokenizer = opened.transformer, opened.tokenizer
    reads_source = model.config.shape == "encoder-decoder"
    texts = [Text(prompt, "" if reads_source else prompt, TextStream(tokenizer, args.stop)) for prompt in prompts]
    stops, banned = stop_and_banned(tokenizer, model.config, opened.start if reads_source else ())

    def on_token(row: int, token: int) -> bool:
        text = texts[row]
        text.tokens += 1
        piece = text.stream.push(token)
        if streams_live:
            print(piece, end="", flush=True)
        return text.stream.stopped

    if streams_live:
        print(texts[0].shown_prompt, end="", flush=True)
    read = [opened.start if reads_source else [tokenizer.document_id, *ids] for ids in encoded]
    sources = [framed(ids, opened.frame, model.config.context) or [tokenizer.document_id] for ids in encoded]
    common: dict[str, Any] = {
        "sources": sources if reads_source else None,
        "max_new_tokens": args.max_new_tokens,
        "stop_ids": stops,
        "banned_ids": banned,
        "use_cache": args.cache,
    }
    if args.beams > 1:
        found = beam_search(model, read, beams=args.beams, length_penalty=args.length_penalty, **common)
        for row, tokens in enumerate(found):
            any(on_token(row, token) for token in tokens)  # up to a stop string
    else:
        generate(model, read, sampling=sampling, seed=args.seed, first_row=first_row, on_token=on_token, **common)
    for text in texts:
        rest = text.stream.flush()
        if streams_live:
            print(rest, flush=True)
        text.ended = "stop" if text.stream.stopped else "length" if text.tokens == args.max_new_tokens else "end"
    return texts


def _print(text: Text, row: int, args: Args, *, alone: bool, shown_already: bool) -> None:
    if args.json:
        result = {"prompt": text.prompt, "text": text.stream.text, "tokens": text.tokens, "ended": text.ended}
        print(json.dumps(result, ensure_ascii=False), flush=True)
    elif not shown_already:
        if not alone:
            print(f"--- prompt {row // args.num + 1}, text {row % args.num + 1} ---")
        print(text.shown_prompt + text.stream.text, flush=True)


def _speed(tokens: int, seconds: float, model: Transformer, cache: bool) -> str:
    weight = model.embedding.weight
    dtype = next(name for name, dtype in DTYPES.items() if dtype == weight.dtype)
    how = f"{weight.device.type}, {dtype}, {'KV cache' if cache else 'no cache'}"
    return f"{tokens:,} tokens in {seconds:.2f} s: {tokens / seconds:,.0f} tokens/s ({how})"


def _prompts(args: Args) -> list[str]:
    """From --prompt or from --input. Raises `UserError` where neither or both are given, or the file does not fit."""
    if bool(args.prompt) == (args.input is not None):
        raise UserError("give what is to be continued: either --prompt TEXT (several times if need be) or --input FILE")
    if args.input is None:
        return list(args.prompt)
    content = args.input.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{args.input} is not UTF-8 at byte {error.start}: convert it, or name another file") from None
    # `str.splitlines` would cut at U+2028 and seven more, which may stand inside a prompt or a JSON string.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{args.input} is empty: give one prompt a line")
    if args.input.suffix == ".jsonl":
        return [_prompt_of(line, f"{args.input}:{number}") for number, line in lines]
    return [line for _, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    for key in ("prompt", "text", "source"):
        if isinstance(value, dict) and isinstance(value.get(key), str):
            return value[key]
    raise UserError(f'{where} has no text under "prompt", "text" or "source"')


def _warn_of_long_prompts(encoded: list[list[int]], opened: Opened) -> None:
    model = opened.transformer
    reads_source = model.config.shape == "encoder-decoder"
    context = model.config.context if reads_source else room(model)
    longest = max(map(len, encoded)) + (sum(map(len, opened.frame)) if reads_source else 1)
    if longest > context:
        part = "beginning" if reads_source else "end"
        print(
            f"warning: a prompt has {longest} tokens, the model's context {context}: only its {part} is read",
            file=sys.stderr,
        )


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except ValueError as error:  # a character that a character-level tokenizer never saw, or half of one
        raise UserError(f"the prompt {prompt[:40]!r} cannot be encoded: {error}") from error


def _place(model: Transformer, device: str, dtype: str) -> None:
    if dtype == "auto":
        dtype = "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    model.to(device, DTYPES[dtype])
