"""What an imported BART writes is what Transformers writes: from the same ids on, for a source in the same frame."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillm.commands.tasks import opened_means
from minillm.config import UserError
from minillm.interop.configs import Fields
from minillm.interop.export import Beside, export
from minillm.interop.token_roles import decoder_start
from minillm.loading import open_model
from minillm.tasks.writing import write
from tests.finetuning import minillm
from tests.interop.bart import BOS, EOS, bart_in, written
from tests.interop.ours import model_of, tokenizer_of
from tests.interop.test_hf_in import set_config

TEXTS = ["def width(self", "who may withdraw", "a", "class Account: numbers 1, 22, 333", "prose"]
TOKENS = 14


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """(folder, model, tokenizer)"""
    folder = tmp_path_factory.mktemp("bart")
    torch.manual_seed(0)
    return folder, *bart_in(folder)


def generated(capsys: pytest.CaptureFixture[str], model: Path, *options: Any) -> list[str]:
    prompts = [part for text in TEXTS for part in ("--prompt", text)]
    done = minillm(capsys, "generate", model, *prompts, "--max-new-tokens", TOKENS, "--json", *options)
    assert done.code == 0, done.err
    return [json.loads(line)["text"] for line in done.out.splitlines()]


@pytest.mark.parametrize(
    ("beams", "length_penalty"), [(1, 1.0), (3, 1.0), (3, 0.0), (2, 2.0)], ids=["greedy", "beam", "likeliest", "long"]
)
def test_the_folder_and_its_import_write_what_transformers_writes(
    beams: int, length_penalty: float, bart: tuple[Path, Any, Any], tmp_path: Path, capsys
) -> None:
    folder, theirs, auto = bart
    options = {} if beams == 1 else {"length_penalty": length_penalty, "early_stopping": True}
    ids = written(theirs, auto, TEXTS, TOKENS, num_beams=beams, **options)
    assert len({tuple(row) for row in ids}) > 2 and max(len(set(row)) for row in ids) > 3
    expected = auto.batch_decode(ids, clean_up_tokenization_spaces=False)
    argv = ["--temperature", 0] if beams == 1 else ["--beams", beams, "--length-penalty", length_penalty]
    assert generated(capsys, folder, *argv) == expected
    assert minillm(capsys, "import", folder, "--out", tmp_path / "run").code == 0
    assert generated(capsys, tmp_path / "run", *argv) == expected
    for model in (folder, tmp_path / "run"):
        opened = open_model(model)
        assert opened.start == [EOS, BOS] and opened.frame == ([BOS], [EOS])


def test_predict_writes_the_same(bart: tuple[Path, Any, Any], tmp_path: Path, capsys) -> None:
    folder, theirs, auto = bart
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    for beams, options in ((1, {}), (3, {"early_stopping": True})):
        argv = ["--task", "seq2seq", "--input", tmp_path / "texts.txt", "--max-new-tokens", TOKENS, "--beams", beams]
        done = minillm(capsys, "predict", folder, *argv)
        assert done.code == 0, done.err
        ids = written(theirs, auto, TEXTS, TOKENS, num_beams=beams, **options)
        answers = [json.loads(line)["target"] for line in done.out.splitlines()]
        assert answers == auto.batch_decode(ids, clean_up_tokenization_spaces=False)


def test_it_goes_out_as_it_came(bart: tuple[Path, Any, Any], tmp_path: Path, capsys) -> None:
    import transformers

    folder, theirs, auto = bart
    assert minillm(capsys, "export", folder, "--out", tmp_path / "out").code == 0
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written(again, opened, TEXTS, TOKENS) == written(theirs, auto, TEXTS, TOKENS)
    assert open_model(tmp_path / "out").start == [EOS, BOS]


def test_what_was_finetuned_here_begins_as_in_its_training(tmp_path: Path) -> None:
    """And an export of it reads texts in the frame of its rows, in Transformers too."""
    import transformers

    tokenizer = tokenizer_of("bpe")
    model = model_of("bart", tokenizer.vocab_size)
    export(model, tokenizer, tmp_path / "out", Beside(rows=True))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    begin, end = tokenizer.document_id, tokenizer.end_id
    assert auto("who may")["input_ids"] == [begin, *tokenizer.encode("who may"), end]
    assert (theirs.generation_config.decoder_start_token_id, theirs.generation_config.forced_bos_token_id) == (
        begin,
        None,
    )
    opened = open_model(tmp_path / "out")
    assert opened.start == [begin] and opened.frame == ([begin], [end])
    plain = open_model(_exported(tmp_path / "plain"))
    assert plain.frame == ([], [])


def _exported(folder: Path) -> Path:
    tokenizer = tokenizer_of("bpe")
    export(model_of("bart", tokenizer.vocab_size), tokenizer, folder)
    return folder


def test_the_start_is_the_one_that_transformers_finds(tmp_path: Path) -> None:
    bart_in(tmp_path)
    generation = tmp_path / "generation_config.json"
    said = json.loads(generation.read_text())
    for changes in ({}, {"decoder_start_token_id": 5, "forced_bos_token_id": None}, {"decoder_start_token_id": None}):
        generation.write_text(json.dumps(said | changes))
        assert open_model(tmp_path).start == _theirs(tmp_path), changes
    generation.unlink()
    for changes in (
        {},
        {"forced_bos_token_id": 7},
        {"decoder_start_token_id": 4},
        {"decoder_start_token_id": "absent"},
    ):
        set_config(tmp_path, **changes)
        assert open_model(tmp_path).start == _theirs(tmp_path), changes
    assert open_model(tmp_path).start == [BOS, 7]


def _theirs(folder: Path) -> list[int]:
    import transformers

    config = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).generation_config
    first = config.bos_token_id if config.decoder_start_token_id is None else config.decoder_start_token_id
    return [first] if config.forced_bos_token_id is None else [first, config.forced_bos_token_id]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"forced_bos_token_id": 99}, "the decoder begins with id 99, and the model has 41"),
        ({"decoder_start_token_id": -1}, "the decoder begins with id -1"),
        ({"decoder_start_token_id": "</s>"}, "decoder_start_token_id is </s>, which is no number"),
    ],
)
def test_what_is_no_id_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"config.json: {message}"):
        decoder_start(tmp_path, Fields(said, "config.json"), 41)


def test_written_texts_begin_with_what_the_means_say(bart: tuple[Path, Any, Any]) -> None:
    """Without a start of its own a model is one that was trained here."""
    folder, *_ = bart
    opened = open_model(folder)
    means = opened_means(opened)
    assert means.start == [EOS, BOS]
    source = [[BOS, *opened.tokenizer.encode(text), EOS] for text in TEXTS]
    texts, others = (
        write(opened.model, one, source, max_new_tokens=TOKENS) for one in (means, replace(means, start=()))
    )
    assert texts != others


PAIRS = [("def width(self", "who may withdraw"), ("class Account: numbers 1, 22", "a"), ("prose", "words, and more")]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in PAIRS))
    return path


def their_loss(theirs: Any, auto: Any) -> float:
    """The mean over all labels, which begin and end with the tokenizer's own frame."""
    read = auto([source for source, _ in PAIRS], padding=True, return_tensors="pt")
    labels = auto([target for _, target in PAIRS], padding=True, return_tensors="pt")
    targets = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
    with torch.no_grad():
        return theirs(input_ids=read["input_ids"], attention_mask=read["attention_mask"], labels=targets).loss.item()


@pytest.mark.parametrize("forced", [BOS, None])
def test_the_loss_of_a_pair_is_the_one_of_transformers(
    forced: int | None, bart: tuple[Path, Any, Any], pairs: Path, tmp_path: Path, capsys
) -> None:
    """Also where nothing forces the <s> that its targets begin with."""
    folder, theirs, auto = bart
    copied = shutil.copytree(folder, tmp_path / "bart")
    generation = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(generation | {"forced_bos_token_id": forced}))
    done = minillm(capsys, "evaluate", copied, "--task", "seq2seq", "--data", pairs, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["loss"] == pytest.approx(their_loss(theirs, auto), abs=1e-4)


def test_a_finetuned_one_goes_on_with_the_same_frames(
    bart: tuple[Path, Any, Any], pairs: Path, tmp_path: Path, capsys
) -> None:
    """Its first loss is Transformers', and an export of it begins as the import did."""
    import transformers

    folder, theirs, auto = bart
    argv = ["--task", "seq2seq", "--data", pairs, "--val", pairs, "--steps", 1, "--train.batch", 2, "--optim.lr", 1e-9]
    done = minillm(capsys, "finetune", folder, *argv, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    first = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    loss = next(line["loss"] for line in first if line.get("split") == "val")
    assert loss == pytest.approx(their_loss(theirs, auto), abs=1e-4)
    opened = open_model(tmp_path / "run")
    assert opened.start == [EOS, BOS] and opened.frame == ([BOS], [EOS])
    again = json.loads(minillm(capsys, "evaluate", tmp_path / "run", "--data", pairs, "--json").out)
    assert again["loss"] == pytest.approx(loss, abs=1e-4)
    assert minillm(capsys, "export", tmp_path / "run", "--out", tmp_path / "out").code == 0
    exported = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert written(exported, auto, TEXTS, TOKENS) == written(theirs, auto, TEXTS, TOKENS)


def test_a_prompt_is_read_in_the_frame_too(bart: tuple[Path, Any, Any], tmp_path: Path, capsys) -> None:
    """`predict --task lm` says what `generate` says, and how much of a long text was not read."""
    folder, *_ = bart
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    argv = ["--task", "lm", "--input", tmp_path / "texts.txt", "--max-new-tokens", TOKENS]
    answers = [json.loads(line) for line in minillm(capsys, "predict", folder, *argv).out.splitlines()]
    assert answers == [
        {"prompt": prompt, "text": text}
        for prompt, text in zip(TEXTS, generated(capsys, folder, "--temperature", 0), strict=True)
    ]
    (tmp_path / "texts.txt").write_text("1" * 60)
    tokens = len(open_model(folder).tokenizer.encode("1" * 60))
    (answer,) = [json.loads(line) for line in minillm(capsys, "predict", folder, *argv).out.splitlines()]
    assert answer["unread_tokens"] == tokens - (48 - 2) > 0


def test_a_text_goes_on_behind_a_mark_that_nothing_forces(bart: tuple[Path, Any, Any], tmp_path: Path, capsys) -> None:
    """A BART without forced_bos_token_id says <s> of itself: that ends no text, and is no part of one."""
    folder, theirs, auto = bart
    copied = shutil.copytree(folder, tmp_path / "bart")
    weights = load_file(copied / "model.safetensors")
    weights["final_logits_bias"][0, BOS] = 4.0
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    generation = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(generation | {"forced_bos_token_id": None}))
    opened = type(theirs).from_pretrained(copied).eval()
    read = auto(TEXTS, padding=True, return_tensors="pt")
    inputs = {"input_ids": read["input_ids"], "attention_mask": read["attention_mask"]}
    ids = opened.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[:, 1:].tolist()
    assert any(BOS in row for row in ids)
    expected = auto.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert generated(capsys, copied, "--temperature", 0) == expected
