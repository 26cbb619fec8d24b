"""What was written for Transformers, opened with Transformers and compared with the model that it came from.

Logits agree within `TOLERANCE`, ids and texts of a sample are equal; else nothing counts as written.
T tokens, V vocabulary.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import UserError
from minillm.interop.hf_tokenizer import HFTokenizer
from minillm.model.heads import TaskModel

TOLERANCE = 1e-4
SAMPLE = (
    "def total(prices: dict[str, float]) -> float:\n    return sum(prices.values())  # in euros\n",
    "class Tree:\n\tdef __init__(self, *children):\n\t\tself.children = list(children)\n\n\n",
    "The quick brown fox, 1,234.5 times; isn't it?  Two spaces,   three.    Four.\r\n",
    "Größe, café, naïve – “quoted” … Привет, мир! 你好，世界。こんにちは 🙂👩‍🚀 ﷽ e\u0301\u200b\ufeff",
    "",
    " ",
    "\n\n \n",
    "<0x41> &amp; \\n \x00\x01\x7f",
)


def open_theirs(folder: Path, architecture: str) -> Any:
    """The model in the folder, with every tensor in its place. Raises `UserError` by the name of one that is not."""
    import transformers

    known = {"GPT2LMHeadModel": "CausalLM", "BartForConditionalGeneration": "Seq2SeqLM"}
    kind = known.get(architecture, architecture.partition("For")[2])
    auto = getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")
    options = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    opened, found = auto.from_pretrained(folder, **options)
    name = type(opened).__name__
    missing = {key for key in found["missing_keys"] if name != "BertModel" or not key.startswith("pooler.")}
    if wrong := sorted({*missing, *found["unexpected_keys"], *found["mismatched_keys"]}, key=str):
        raise UserError(f"the export does not open as {name}: {wrong[0]}; nothing was written")
    return opened.eval()


@torch.no_grad()
def verify(
    opened: Any, model: nn.Module, task: Mapping[str, Any] | None, architecture: str, *, context: int | None = None
) -> None:
    """Raises `UserError` unless a model of theirs computes what `model` does.

    Args:
        model: a Transformer, or with `task` a `TaskModel`; fp32, on the CPU, in evaluation mode.
        context: longest row; None: the model's own.
    """
    longest = context or model.config.context
    if isinstance(model, TaskModel):
        _verify_task(opened, model, task or {}, architecture, min(longest, 24))
        return
    config, generator = model.config, torch.Generator().manual_seed(0)
    T = min(longest, 48)
    ids = torch.randint(config.vocab_size, (2, T), generator=generator)
    source = torch.randint(config.vocab_size, (2, T), generator=generator)
    if config.shape == "encoder-decoder":
        theirs, ours = opened(input_ids=source, decoder_input_ids=ids).logits, model(ids, source=source)
    elif architecture != "BertModel":
        theirs, ours = opened(input_ids=ids).logits, model(ids)
    else:
        theirs, ours = opened(input_ids=ids).last_hidden_state, model.states(ids)
    _compare(architecture, theirs[:, -T:], ours)  # before them PEFT has those of a soft prompt


def _verify_task(opened: Any, model: TaskModel, task: Mapping[str, Any], architecture: str, T: int) -> None:
    """Outputs of rows that are padded there and alone here."""
    config, pad = model.config, opened.config.pad_token_id
    others = torch.tensor([i for i in range(config.vocab_size or 1) if i != pad])
    ids = others[torch.randint(len(others), (4, T), generator=torch.Generator().manual_seed(0))]
    lengths = [T, T // 2 + 1, min(3, T), T - 1]
    real = torch.arange(T) < torch.tensor(lengths).unsqueeze(1)
    ids = ids.masked_fill(~real, pad)
    types = (torch.arange(T) >= 2).long().expand(4, T) if config.token_types > 1 else None
    out = opened(input_ids=ids, attention_mask=real.long(), **({} if types is None else {"token_type_ids": types}))
    theirs = torch.stack((out.start_logits, out.end_logits), -1) if "start_logits" in out else out.logits
    for row, n in enumerate(lengths):
        ours = model(ids[row : row + 1, :n], token_types=None if types is None else types[:1, :n])[0]
        if task["name"] == "regress":
            ours = ours * task["info"]["std"] + task["info"]["mean"]
        _compare(architecture, theirs[row] if model.pool is not None else theirs[row, :n], ours)


def _compare(name: str, theirs: Tensor, ours: Tensor) -> None:
    if theirs.shape != ours.shape:
        raise UserError(
            f"the exported {name} gives {tuple(theirs.shape)}, not {tuple(ours.shape)}: nothing was written"
        )
    difference = (theirs - ours).abs().max().item()
    if not difference <= TOLERANCE:
        raise UserError(f"the exported {name} differs by {difference:.1e} from the model: nothing was written")


def verify_rows(folder: Path, tokenizer: Any) -> None:
    """Raises `UserError` unless AutoTokenizer makes of texts the rows that a finetuned model was given."""
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    first, second = map(_writable(tokenizer), ("total of prices", "in euros"))
    expected = [tokenizer.document_id, *tokenizer.encode(first), tokenizer.end_id]
    pair = [*expected, *tokenizer.encode(second), tokenizer.end_id]
    if auto(first)["input_ids"] != expected or auto(first, second)["input_ids"] != pair:
        raise UserError("the exported tokenizer builds other rows than the model was finetuned on: nothing was written")


def verify_ids(folder: Path, tokenizer: Any) -> list[str]:
    """Raises `UserError` unless AutoTokenizer gives the same ids and texts for the sample; returns what to note."""
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reordered = 0
    spellings = [tokenizer.pieces[i] for i in tokenizer.special.values()]
    texts = [text for text in map(_writable(tokenizer), _sample()) if not any(one in text for one in spellings)]
    for text in texts:
        ids = tokenizer.encode(text)
        theirs = opened.encode(text, add_special_tokens=False)
        same = ids == theirs
        if not same and tokenizer.type == "unigram" and sorted(ids) == sorted(theirs):
            reordered, same = reordered + 1, True
        back = opened.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not same or back != tokenizer.decode(ids):
            raise UserError(f"the exported tokenizer treats {text[:40]!r} in another way: nothing was written")
    if tokenizer.type == "unigram" and not isinstance(tokenizer, HFTokenizer):
        return [
            "unigram: where the same pieces in another order have the same score, rounding decides, and Transformers "
            f"rounds otherwise ({reordered} of {len(texts)} texts of the sample)"
        ]
    return []


def _sample() -> list[str]:
    """SAMPLE, and seeded strings of its characters in any order, runs of spaces among them."""
    choice = random.Random(0)
    characters = sorted({character for text in SAMPLE for character in text}) + [" "] * 20
    mixed = ["".join(choice.choices(characters, k=choice.randint(1, 40))) for _ in range(200)]
    return [*SAMPLE, *mixed]


def _writable(tokenizer: Any) -> Callable[[str], str]:
    """What the tokenizer can encode of a text: of a character-level one the characters that it knows."""
    if tokenizer.type != "char":
        return lambda text: text
    known = {text.decode() for text in tokenizer.token_bytes if text}
    return lambda text: "".join(character for character in text if character in known)


class quiet:
    """Transformers' progress bars and hints belong to no line of ours."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
