"""Texts that are written: `seq2seq`, `chat`, `lm` and `preference`, all through the model's own output matrix."""

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minillm.config import UserError
from minillm.data.batch import Batch
from minillm.data.chat import ChatData, ChatExample, read_chat
from minillm.data.preference import PreferenceData, PreferenceExample, read_preferences
from minillm.data.records import Record, read_records
from minillm.data.seq2seq import PairData, PairExample, Sides, read_pairs
from minillm.data.tasks import encode
from minillm.data.windows import FEW, TextDocument, WindowData, divide, read_documents
from minillm.evaluation.language import language_scores
from minillm.evaluation.translation import bleu, rouge_l
from minillm.inference.beam import beam_search
from minillm.inference.generate import generate
from minillm.inference.reader import framed, window_start
from minillm.inference.sampling import Sampling
from minillm.inference.stream import stop_and_banned
from minillm.tasks.info import said
from minillm.tasks.task import ROWS, Means, Task, batches, evaluating, outputs, spelt_bytes, unread
from minillm.training.objectives import Objective, likelihood, preference_loss, reward_margins

GREEDY = Sampling(temperature=0.0)


def write(
    model: Any,
    means: Means,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    beams: int = 1,
) -> list[str]:
    """What the model goes on with behind each prompt; an encoder-decoder reads them with its encoder.

    With several `beams` it is the likeliest text that a beam search finds, and nothing is drawn.
    """
    encoder_decoder = means.config.shape == "encoder-decoder"
    stops, banned = stop_and_banned(means.tokenizer, means.config, means.start if encoder_decoder else ())
    banned |= set(means.tokenizer.sentinel_ids) if encoder_decoder else set()  # they are of pretraining alone
    texts: list[str] = []
    rows = max(1, ROWS // beams)
    for first in range(0, len(prompts), rows):
        part = prompts[first : first + rows]
        read = [means.start or [means.tokenizer.document_id]] * len(part) if encoder_decoder else part
        common: dict[str, Any] = {
            "sources": part if encoder_decoder else None,
            "max_new_tokens": max_new_tokens,
            "stop_ids": stops,
            "banned_ids": banned,
        }
        if beams > 1:
            written = beam_search(model, read, beams=beams, **common)
        else:
            written = generate(model, read, sampling=sampling, seed=seed, first_row=first, **common)
        texts += [means.tokenizer.decode(ids) for ids in written]
    return texts


def text_scores(model: nn.Module, data: Any, means: Means) -> dict[str, float]:
    """perplexity and bits_per_byte of the targets."""
    targets, spelt = spelt_bytes(data, means.tokenizer)
    total = 0.0
    with evaluating(model) as device:
        for batch in batches(data):
            total += likelihood(model, batch.to(device)).double().item()
    return language_scores(total / max(1, targets), targets=max(1, targets), text_bytes=max(1, spelt))


class Seq2Seq(Task):
    """A text for a text; scored by what is written greedily, or found by a beam search."""

    name, judged, shapes = "seq2seq", "rouge_l", ("decoder", "encoder-decoder")
    beams = 1
    """With which final metrics are written."""

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[PairExample]:
        return read_pairs(records, labelled=labelled)

    def given(self, example: PairExample) -> Hashable:
        return example.source

    def data(self, examples: Sequence[PairExample], means: Means, *, labelled: bool = True) -> PairData:
        sides = None
        if means.config.shape == "encoder-decoder":
            begin, end = [means.tokenizer.document_id], [means.tokenizer.end_id]
            sides = Sides(means.start or begin, *(means.frame if any(means.frame) else (begin, end)))
        return PairData(examples, means.tokenizer, context=means.room, sides=sides)

    def final_metrics(
        self, model: nn.Module, data: PairData, means: Means, start: nn.Module | None
    ) -> dict[str, float]:
        longest = max(map(len, data.targets))
        written = write(model, means, data.sources, max_new_tokens=longest, beams=self.beams)
        targets = [example.target or "" for example in data.examples]
        return text_scores(model, data, means) | _overlap(written, targets)

    def baseline(self, train: Sequence[PairExample], val: Sequence[PairExample]) -> tuple[str, dict[str, float]]:
        """The better one, by ROUGE-L, of the source itself and the most frequent target."""
        targets = [example.target or "" for example in val]
        [(common, _)] = Counter(example.target or "" for example in train).most_common(1)
        tried = {
            "the source itself": _overlap([example.source for example in val], targets),
            "the most frequent target": _overlap([common] * len(val), targets),
        }
        best = max(tried, key=lambda name: tried[name]["rouge_l"])
        return best, tried[best]

    def answers(
        self,
        model: nn.Module,
        examples: Sequence[PairExample],
        means: Means,
        *,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Iterator[dict]:
        data = self.data(examples, means, labelled=False)
        written = write(model, means, data.sources, max_new_tokens=max_new_tokens, **options)
        for example, text, lost in zip(examples, written, data.lost, strict=True):
            yield {"source": example.source, "target": text} | unread(lost)


def _overlap(written: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    references = [[target] for target in targets]
    exact = [text.strip() == target.strip() for text, target in zip(written, targets, strict=True)]
    return {
        "bleu": bleu(written, references),
        "rouge_l": rouge_l(written, references),
        "exact_match": sum(exact) / len(exact),
    }


class Chat(Task):
    """Replies; only they are learnt, in the one chat template."""

    name, shapes = "chat", ("decoder",)

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[ChatExample]:
        return read_chat(records, labelled=labelled)

    def given(self, example: ChatExample) -> Hashable:
        return json.dumps(example.messages)

    def data(self, examples: Sequence[ChatExample], means: Means, *, labelled: bool = True) -> ChatData:
        encode = partial(means.encode_chat, means.tokenizer)
        return ChatData(examples, encode, pad_id=means.tokenizer.pad_id, context=means.room)

    def final_metrics(
        self, model: nn.Module, data: ChatData, means: Means, start: nn.Module | None
    ) -> dict[str, float]:
        return text_scores(model, data, means)

    def answers(
        self, model: nn.Module, examples: Sequence[Any], means: Means, *, max_new_tokens: int = 128, **options: Any
    ) -> Iterator[dict]:
        prompts = [chat_prompt(example.record, question(example.messages), means) for example in examples]
        written = write(model, means, prompts, max_new_tokens=max_new_tokens, **options)
        for example, text, prompt in zip(examples, written, prompts, strict=True):
            answer = {"messages": question(example.messages), "reply": text}
            yield answer | unread(window_start(len(prompt), means.room))


def question(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The messages up to the last one of the user: a reply that the file has is what the model should write."""
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    while plain and plain[-1]["role"] == "assistant":
        plain.pop()
    return plain


def chat_prompt(record: Record, messages: Sequence[Mapping[str, str]], means: Means) -> list[int]:
    """Ids up to the assistant's header. Raises `UserError` with the record's place."""
    try:
        return means.encode_chat(means.tokenizer, messages, reply=True)[0]
    except ValueError as error:
        record.fail(str(error))


class Preference(Task):
    """A reply that is preferred to another one: direct preference optimization against the model as it was."""

    name, shapes, needs_start = "preference", ("decoder",), True

    def __init__(self, *, beta: float = 0.1) -> None:
        if beta <= 0:
            raise UserError(f"--beta must be positive, not {beta}")
        self.beta = beta
        """How dear it is to move away from the start."""

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[Any]:
        return read_preferences(records) if labelled else read_chat(records, labelled=False)

    def given(self, example: PreferenceExample) -> Hashable:
        return json.dumps(example.prompt)

    def info(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def from_info(self, info: Mapping[str, Any]) -> None:
        self.beta = said(info, "beta", float)

    def data(self, examples: Sequence[PreferenceExample], means: Means, *, labelled: bool = True) -> PreferenceData:
        encode = partial(means.encode_chat, means.tokenizer)
        return PreferenceData(examples, encode, pad_id=means.tokenizer.pad_id, context=means.room)

    def score(self, start: nn.Module | None) -> Objective:
        assert start is not None
        return partial(_preference, start=start, beta=self.beta)

    def count(self, batch: Batch) -> int:
        return len(batch.ids) // 2

    def metrics(
        self, model: nn.Module, data: PreferenceData, means: Means, start: nn.Module | None
    ) -> dict[str, float]:
        """reward_margin, and reward_accuracy: the share of pairs whose chosen reply has the higher reward."""
        assert start is not None
        margins = np.array(outputs(model, data, lambda m, batch: reward_margins(m, start, batch, self.beta)))
        return {"reward_margin": float(margins.mean()), "reward_accuracy": float((margins > 0).mean())}

    def baseline(self, train: Sequence[Any], val: Sequence[Any]) -> tuple[str, dict[str, float]]:
        loss = float(-F.logsigmoid(torch.zeros(())))
        return "the model as it was", {"loss": loss, "reward_margin": 0.0, "reward_accuracy": 0.0}

    def answers(self, model: nn.Module, examples: Sequence[Any], means: Means, **options: Any) -> Iterator[dict]:
        return Chat().answers(model, examples, means, **options)


def _preference(model: nn.Module, batch: Batch, *, start: nn.Module, beta: float) -> torch.Tensor:
    return preference_loss(model, start, batch, beta)


class LM(Task):
    """Continued pretraining on plain text: the next token, hidden tokens or hidden spans, as the model's shape asks."""

    name = "lm"

    def read(self, path: str | Path, *, labelled: bool = True) -> list[Any]:
        return read_documents(str(path)) if labelled else self.examples(read_records(path), labelled=False)

    def examples(self, records: Sequence[Record], *, labelled: bool = True) -> list[TextDocument]:
        """Prompts to go on with, in the field "text" or "prompt"."""
        for record in records:
            if "prompt" not in record.fields:
                record.require(("text",), self.name)
        return [TextDocument(r, r.text("prompt" if "prompt" in r.fields else "text")) for r in records]

    def given(self, example: TextDocument) -> Hashable:
        return example.text

    def hold_out(self, examples: Sequence[TextDocument], share: float, seed: int) -> tuple[list, list]:
        """Of few documents the end of each."""
        return divide(examples, share) if len(examples) < FEW else super().hold_out(examples, share, seed)

    def data(self, examples: Sequence[TextDocument], means: Means, *, labelled: bool = True) -> WindowData:
        return WindowData(examples, means.tokenizer, means.plain_text, context=means.room)

    def final_metrics(
        self, model: nn.Module, data: WindowData, means: Means, start: nn.Module | None
    ) -> dict[str, float]:
        if means.config.shape != "decoder":
            return {}
        total, targets = 0.0, 0
        with evaluating(model) as device:
            for batch in batches(data):
                total += likelihood(model, batch.to(device)).double().item()
                targets += batch.counted
        return language_scores(total / max(1, targets), targets=max(1, targets), text_bytes=data.bytes)

    def answers(
        self, model: nn.Module, examples: Sequence[Any], means: Means, *, max_new_tokens: int = 128, **options: Any
    ) -> Iterator[dict]:
        begin = means.tokenizer.document_id
        texts = [encode(means.tokenizer, example.record, example.text) for example in examples]
        if means.config.shape == "encoder-decoder":
            prompts = [framed(text, means.frame, means.room) or [begin] for text in texts]
            lost = [max(0, len(text) + sum(map(len, means.frame)) - means.room) for text in texts]
        else:
            prompts = [[begin, *text] for text in texts]
            lost = [window_start(len(prompt), means.room) for prompt in prompts]
        written = write(model, means, prompts, max_new_tokens=max_new_tokens, **options)
        for example, text, tokens in zip(examples, written, lost, strict=True):
            yield {"prompt": example.text, "text": text} | unread(tokens)
