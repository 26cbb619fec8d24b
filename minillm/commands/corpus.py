"""What a run reads and how it shows what it learned: tokenizer, shards, objective, samples, made from its settings."""

import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from minillm.commands.running import say
from minillm.config import Settings, UserError
from minillm.data.batch import IGNORED
from minillm.data.corpus import Masked, NextToken, SpanCorruption
from minillm.data.loader import VALIDATION
from minillm.data.shards import Shards, default_workers, is_prepared, open_shards, prepare
from minillm.data.sources import Source
from minillm.data.split import plan
from minillm.inference import showcase
from minillm.loading import load_tokenizer
from tokenizer import Tokenizer, train

Sampler = Callable[[nn.Module, int], Iterable[dict[str, Any]]]


def run_tokenizer(settings: Settings, source: Source, run: Path) -> Tokenizer:
    """The run's tokenizer: as it stands in the run folder, else a given one, else one trained on the training text.

    A character-level one takes its alphabet from all of the text, as nanoGPT does: it would refuse a character that
    only the validation text has.
    """
    folder = run / "tokenizer"
    if (folder / "manifest.json").is_file() and (folder / "tokenizer.model").is_file():
        return load_tokenizer(folder)
    given = settings.tokenizer.path or (source.prepared / "tokenizer" if source.prepared is not None else None)
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(f"{given} is no folder: prepared data needs its tokenizer; name it with --tokenizer.path")
        tokenizer = load_tokenizer(given)
    else:
        split = plan(source, settings.data.validation)
        everything = settings.tokenizer.type == "char"
        texts = (piece.text for piece in split.pieces(source) if everything or not piece.held_out)
        try:
            tokenizer = train(
                texts, type=settings.tokenizer.type, vocab_size=settings.tokenizer.vocab_size, seed=settings.seed
            )
        except UserError:  # the source's, which names its place already
            raise
        except ValueError as error:
            raise UserError(f"{source.name}: {error} (--tokenizer.vocab-size N)") from error
    tokenizer.save(folder)
    return tokenizer


def run_shards(settings: Settings, source: Source, run: Path, tokenizer: Tokenizer) -> Shards:
    """The run's token ids: those of a prepared folder, else those in the run folder, made first where they are not."""
    folder = source.prepared or run / "data"
    if source.prepared is None and not is_prepared(folder):
        shutil.rmtree(folder, ignore_errors=True)
        tokenize(source, folder, tokenizer, validation=settings.data.validation, workers=settings.data.workers)
    return open_shards(
        folder, tokenizer_hash=tokenizer.hash, vocab_size=settings.model.vocab_size or tokenizer.vocab_size
    )


def tokenize(source: Source, out: Path, tokenizer: Tokenizer, *, workers: int | None, **options: Any) -> Shards:
    """`prepare` with a tokenizer's ids, a progress bar and a list of what was skipped; `options` are `prepare`'s."""
    workers = workers or default_workers(source)
    with tqdm(total=source.size, unit="B", unit_scale=True, desc="tokenizing", disable=None, file=sys.stderr) as bar:
        shards = prepare(
            source,
            out,
            # one process encodes in threads; several leave the cores to each other
            encode=tokenizer.encode_batch if workers == 1 else partial(tokenizer.encode_batch, threads=1),
            tokenizer_hash=tokenizer.hash,
            vocab_size=tokenizer.vocab_size,
            document_id=tokenizer.document_id,
            workers=workers,
            progress=lambda done, _: bar.update(done - bar.n),
            **options,
        )
    list_skipped(source)
    return shards


def list_skipped(source: Source) -> None:
    """Says on stderr what a folder holds that could not be read."""
    if source.skipped:
        say(f"{len(source.skipped)} could not be read and were skipped:")
    for name, reason in source.skipped:
        say(f"  {name}: {reason}")


def run_objective(settings: Settings, tokenizer: Tokenizer) -> NextToken | Masked | SpanCorruption:
    """What is predicted, with the tokenizer's special ids."""
    data = settings.data
    if settings.objective == "next-token":
        return NextToken(document_id=tokenizer.document_id, separate=data.separate)
    if settings.objective == "masked":
        return Masked(
            document_id=tokenizer.document_id,
            mask_id=tokenizer.mask_id,
            special=sorted(tokenizer.special.values()),
            vocab_size=tokenizer.vocab_size,
            rate=data.mask_rate,
            separate=data.separate,
            word_starts=tokenizer.word_starts if data.whole_words else None,
        )
    return SpanCorruption(
        document_id=tokenizer.document_id,
        end_id=tokenizer.end_id,
        sentinel_ids=tokenizer.sentinel_ids,
        rate=data.mask_rate,
        span_length=data.span_length,
    )


def run_sampler(settings: Settings, tokenizer: Tokenizer, shards: Shards, source: Source) -> Sampler:
    """(model, step) -> sample events: the same prompt each time, so that they can be compared."""
    tokens = settings.train.sample_tokens
    if settings.objective == "next-token":
        prompt = settings.train.sample_prompt
        if prompt is None and source.name in ("stdlib", "installed"):
            return lambda model, step: [showcase.functions(model, tokenizer, tokens)]
        prompt = _first_line(shards) if prompt is None else prompt
        try:
            tokenizer.encode(prompt)
        except ValueError as error:
            raise UserError(f"train.sample_prompt {prompt!r}: {error}") from error

        def continues(model: nn.Module, step: int) -> list[dict[str, Any]]:
            text = showcase.continuation(model, tokenizer, prompt, tokens)[0]
            return [{"prompt": prompt, "text": text, "parses": None, "tried": 1}]

        return continues

    objective = run_objective(settings, tokenizer)
    length = min(objective.sizes(settings.model.context)[1], len(shards.val), 96)
    window = shards.val.window(len(shards.val) // 2, length)
    batch = objective.batch(window[None], np.array([length]), np.array([0]), seed=VALIDATION)

    def fills(model: nn.Module, step: int) -> list[dict[str, Any]]:
        if batch.source is None:
            text = showcase.filled_masks(model, tokenizer, batch.ids[0], batch.targets[0], IGNORED)
        else:
            text = showcase.filled_spans(model, tokenizer, batch.source[0].tolist(), batch.ids.shape[1])
        return [{"prompt": "", "text": text, "parses": None, "tried": 1}]

    return fills


def _first_line(shards: Shards) -> str:
    """The first line of the validation text that is more than a word or two; at most 60 characters."""
    text = next(iter(shards.val_text()))[:4096].decode("utf-8", errors="ignore")
    lines = text.split("\n")[1:] or [text]  # the first one may begin in the middle
    return next((line for line in lines if len(line.strip()) > 12), text.strip())[:60]
