"""Classifiers, taggers and answerers: Transformers' opened here, ours opened there, the same outputs both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

from minillm.commands.exporting import main as export_command
from minillm.config import UserError
from minillm.interop import verification
from minillm.interop.export import Beside, export
from minillm.interop.hf import build, load_hf, read_hf
from minillm.interop.hf_tokenizer import HFTokenizer
from minillm.loading import open_model
from minillm.model.heads import HeadConfig, TaskModel, pooled_head
from tests.finetuning import FAST, classify_file, minillm
from tests.interop.ours import finetuned_run, model_of, tokenizer_of
from tests.interop.test_hf_in import rewrite, set_config, tensors_of
from tests.interop.test_hf_tokenizer import byte_level, wordpiece
from tests.interop.theirs import make, save

LENGTHS = (9, 4, 6)
KINDS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
FAMILIES = {"bert": "Bert", "llama": "Llama", "qwen3": "Qwen3", "gpt2": "GPT2"}


def with_layout(tokenizer: HFTokenizer) -> HFTokenizer:
    model = Tokenizer.from_str(tokenizer.content.decode())
    begin, end = (tokenizer.pieces[i] for i in (tokenizer.document_id, tokenizer.end_id))
    model.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B:1 {end}:1",
        special_tokens=list({begin: tokenizer.document_id, end: tokenizer.end_id}.items()),
    )  # fmt: skip
    return HFTokenizer(model.to_str().encode(), tokenizer.settings, tokenizer.roles)


def theirs_in(folder: Path, family: str, kind: str, **changes: Any) -> tuple[Any, HFTokenizer]:
    """A random model of Transformers' with a head, saved with a tokenizer whose template is that of our rows."""
    tokenizer = with_layout(wordpiece() if family == "bert" else byte_level())
    labels = {} if kind == "QuestionAnswering" else {"num_labels": 3}
    sizes = {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id if family == "bert" else 1}
    model = make(family, f"{FAMILIES[family]}For{kind}", **{**labels, **sizes, **changes})
    save(model, folder)
    tokenizer.save(folder)
    (folder / "roles.json").unlink()
    return model, tokenizer


def scores(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return torch.stack((out.start_logits, out.end_logits), -1) if "start_logits" in out else out.logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_theirs_computes_the_same_here(family: str, kind: str, tmp_path: Path) -> None:
    theirs, tokenizer = theirs_in(tmp_path, family, kind)
    opened = open_model(tmp_path)
    ids = torch.randint(5, tokenizer.vocab_size, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS).unsqueeze(1)
    ids = ids.masked_fill(~real, theirs.config.pad_token_id)
    hf, mine = {"input_ids": ids, "attention_mask": real.long()}, {"segments": real.long() - 1}
    if family == "bert":
        hf["token_type_ids"] = mine["token_types"] = torch.randint(2, ids.shape)
    expected = scores(theirs, **hf)
    with torch.no_grad():
        actual = opened.model(ids, **mine)
    places = slice(None) if kind == "SequenceClassification" else real
    assert expected.abs().max() > 0.5 and actual.shape == expected.shape
    assert (actual - expected)[places].abs().max() < 1e-4
    names = dict(zip(KINDS, ("classify", "tag", "span-qa"), strict=True))
    assert opened.config["task"]["name"] == names[kind]


@pytest.mark.parametrize(
    ("said", "labels", "task", "info"),
    [
        ({}, ["LABEL_0", "LABEL_1", "LABEL_2"], "classify", {"multi": False}),
        ({"id2label": {"2": "yes", "0": "no", "1": "so so"}}, ["no", "so so", "yes"], "classify", {"multi": False}),
        (
            {"problem_type": "multi_label_classification"},
            ["LABEL_0", "LABEL_1", "LABEL_2"],
            "classify",
            {"multi": True},
        ),
        ({"num_labels": 1}, None, "regress", {"mean": 0.0, "std": 1.0}),
        ({"num_labels": 1, "problem_type": "regression"}, None, "regress", {"mean": 0.0, "std": 1.0}),
    ],
)
def test_what_the_outputs_mean_comes_along(said, labels, task, info, tmp_path: Path) -> None:
    sizes = {"num_labels": 3, **{key: value for key, value in said.items() if key == "num_labels"}}
    theirs_in(tmp_path, "bert", "SequenceClassification", **sizes)
    set_config(tmp_path, **said)
    found = read_hf(tmp_path).task
    assert found["name"] == task and found["info"].items() >= info.items()
    assert found["info"].get("labels") == labels


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"problem_type": "ranking"}, "problem_type=ranking is not supported"),
        ({"problem_type": "regression"}, "problem_type=regression with 3 outputs"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label does not give each of the 3 outputs a name"),
        ({"id2label": {"0": "a", "1": "b", "2": "b"}}, "id2label does not give each of the 3 outputs a name"),
        ({"minillm": {"threshold": [0.5]}}, "minillm.threshold is no list of 3 numbers"),
        ({"minillm": {"threshold": 0.5}}, "minillm.threshold is no list of 3 numbers"),
        ({"minillm": {"threshold": [0.5, "a", None]}}, "minillm.threshold is no list of 3 numbers"),
        ({"architectures": ["BertForMultipleChoice"]}, "the architecture BertForMultipleChoice is not supported"),
        (
            {"architectures": ["GPT2ForTokenClassification"]},
            "architecture GPT2ForTokenClassification with model_type bert",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    theirs_in(tmp_path, "bert", "SequenceClassification")
    set_config(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        read_hf(tmp_path)


def test_a_head_or_pooler_that_is_missing_and_rows_of_another_make(tmp_path: Path) -> None:
    _, tokenizer = theirs_in(tmp_path, "bert", "SequenceClassification")
    good = tensors_of(tmp_path)
    for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"):
        rewrite(tmp_path, {key: x for key, x in good.items() if key != name})
        with pytest.raises(UserError, match=f"the tensor {name.removeprefix('bert.')} is missing"):
            read_hf(tmp_path)
    rewrite(tmp_path, {**good, "score.weight": good["classifier.weight"].clone()})
    with pytest.raises(UserError, match=r"the tensor score\.weight is surplus"):
        read_hf(tmp_path)
    for name, tensor, said in (
        (
            "classifier.weight",
            torch.zeros(3, 8),
            r"the head's weight has the shape \(3, 8\), and the states are 16 wide",
        ),
        (
            "classifier.weight",
            torch.zeros(3),
            r"classifier has a weight \(3,\) and bias \(3,\), which is no linear layer",
        ),
        (
            "classifier.bias",
            torch.zeros(2),
            r"classifier has a weight \(3, 16\) and bias \(2,\), which is no linear layer",
        ),
        ("classifier.weight", torch.zeros(3, 16, dtype=torch.int8), r"classifier\.weight holds torch\.int8"),
    ):
        rewrite(tmp_path, {**good, name: tensor})
        with pytest.raises(UserError, match=said):
            read_hf(tmp_path)
    rewrite(tmp_path, good)
    load_hf(tmp_path)
    bare = {**json.loads(tokenizer.content), "post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(bare))
    with pytest.raises(UserError, match=r"does not put \[CLS\] before and \[SEP\] behind each text"):
        load_hf(tmp_path)


# Out

HEADS: dict[str, tuple[dict[str, Any], HeadConfig]] = {
    "classify": ({"labels": ["no", "yes", "other"], "multi": False, "counts": [1, 1, 1]}, HeadConfig(outputs=3)),
    "multi": ({"labels": ["a", "b"], "multi": True, "counts": [1, 1]}, HeadConfig(outputs=2)),
    "regress": ({"mean": 3.25, "std": 2.5}, HeadConfig(outputs=1)),
    "tag": ({"labels": ["O", "B-X", "I-X"]}, HeadConfig(outputs=3)),
    "span-qa": ({"unanswerable": True}, HeadConfig(outputs=2)),
}
OUT = [(family, task) for family in FAMILIES for task in HEADS if task != "regress" or family == "bert"]


def finetuned(family: str, task: str, vocab_size: int, pool: str | None = None) -> tuple[TaskModel, dict[str, Any]]:
    """A random model with a random head, and what config.json says of its task."""
    info, config = HEADS[task]
    body = model_of(family, vocab_size)
    if task in ("classify", "multi", "regress"):
        config = pooled_head(config.outputs, body.config, pool or ("pooler" if family == "bert" else None))
    model = TaskModel(body, config).eval()
    with torch.no_grad():
        for module in (model.task_head, model.pooler):
            for parameter in () if module is None else module.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model, {"name": {"multi": "classify"}.get(task, task), "head": vars(config), "info": info}


@pytest.mark.parametrize(("family", "task"), OUT)
def test_ours_opens_there_and_comes_back(family: str, task: str, tmp_path: Path) -> None:
    import transformers

    tokenizer = byte_level() if family == "gpt2" else tokenizer_of("bpe")  # GPT-2's pads with what ends a text
    model, section = finetuned(family, task, tokenizer.vocab_size)
    model.threshold[0] = 0.25
    notes = export(model, tokenizer, tmp_path / "out", Beside(task=section))
    assert any("minillm.threshold" in note for note in notes)
    kind = {"tag": "TokenClassification", "span-qa": "QuestionAnswering"}.get(task, "SequenceClassification")
    theirs = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "out").eval()
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["of the account", "def f(x):", "balance"]
    pairs = ["who may withdraw", "0", "numbers and prose"]
    inputs = auto(texts, pairs, padding=True, return_tensors="pt")
    expected = scores(theirs, **inputs)
    back = open_model(tmp_path / "out")
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        first, second = tokenizer.encode(text), tokenizer.encode(pair)
        ids = [tokenizer.document_id, *first, tokenizer.end_id, *second, tokenizer.end_id]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        options = {"token_types": torch.tensor([types])} if family == "bert" else {}
        with torch.no_grad():
            mine, again = (one(torch.tensor([ids]), **options)[0] for one in (model, back.model))
        if task == "regress":
            mine = mine * 2.5 + 3.25
        assert mine.abs().max() > 0.05
        there = expected[row] if model.pool is not None else expected[row, : len(ids)]
        assert (there - mine).abs().max() < 1e-4 and (again - mine).abs().max() < 1e-5
    assert back.config["task"]["name"] == section["name"]
    assert back.model.threshold.tolist()[0] == 0.25 and back.model.threshold[1:].isnan().all()
    if "labels" in section["info"]:
        names = section["info"]["labels"]
        assert (
            theirs.config.id2label == dict(enumerate(names))
            and theirs.config.label2id["O" if task == "tag" else names[0]] == 0
        )
        assert back.config["task"]["info"]["labels"] == names
    kinds = {"classify": "single_label_classification", "multi": "multi_label_classification", "regress": "regression"}
    assert theirs.config.problem_type == kinds.get(task)
    if task == "span-qa":
        assert back.config["task"]["info"] == {"unanswerable": True}


@pytest.mark.parametrize(
    ("family", "task", "pool", "said"),
    [
        (
            "bert",
            "classify",
            "mean",
            "a head that reads the mean of all states .* reads the pooler: finetune with --pool pooler",
        ),
        ("bert", "classify", "cls", "a head that reads the first state .* --pool pooler"),
        ("llama", "classify", "mean", "LlamaForSequenceClassification reads the last state: --pool last"),
        (
            "qwen3",
            "regress",
            None,
            "Qwen3ForSequenceClassification has no bias, so the mean of the numbers has no place",
        ),
        ("bart", "classify", None, "BART has no model for classify in Hugging Face's format"),
    ],
)
def test_a_head_that_none_of_theirs_computes_is_refused(family, task, pool, said, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("bpe")
    model, section = finetuned(family, task, tokenizer.vocab_size, pool or ("mean" if family == "bart" else None))
    with pytest.raises(UserError, match=said):
        export(model, tokenizer, tmp_path / "out", Beside(task=section))
    assert not list(tmp_path.iterdir())


def test_a_bias_where_theirs_has_none_and_a_head_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minillm.interop import export as module
    from minillm.interop import tokenizer_files

    tokenizer = tokenizer_of("bpe")
    model, section = finetuned("llama", "classify", tokenizer.vocab_size)
    assert model.task_head.bias is None
    old = TaskModel(model.transformer, HeadConfig(outputs=3, pool="last")).eval()  # a run from before
    torch.nn.init.ones_(old.task_head.bias)
    with pytest.raises(UserError, match="LlamaForSequenceClassification has no bias, so the head's bias"):
        export(old, tokenizer, tmp_path / "out", Beside(task={**section, "head": vars(old.head_config)}))
    right = module.write_task

    def wrong(*arguments):
        entries, tensors = right(*arguments)
        return entries, {name: x.flip(0) for name, x in tensors.items()}

    monkeypatch.setattr(module, "write_task", wrong)
    with pytest.raises(UserError, match="the exported LlamaForSequenceClassification differs by"):
        export(model, tokenizer, tmp_path / "out", Beside(task=section))
    monkeypatch.setattr(module, "write_task", right)
    monkeypatch.setattr(tokenizer_files, "_put_layout", lambda *_: None)
    with pytest.raises(UserError, match="the exported tokenizer builds other rows than the model was finetuned on"):
        export(model, tokenizer, tmp_path / "out", Beside(task=section))
    assert not list(tmp_path.iterdir())


# Commands


def test_a_classifier_on_an_imported_bert_begins_with_its_pooler(tmp_path: Path, capsys) -> None:
    """Import, finetune, export, import again: the pooler is the same layer all the way, and answers stay."""
    import transformers

    tokenizer = wordpiece()
    theirs = save(make("bert", "BertModel", vocab_size=tokenizer.vocab_size), tmp_path / "theirs")
    tokenizer.save(theirs)
    assert minillm(capsys, "import", theirs, "--out", tmp_path / "imported").code == 0
    pooler = tensors_of(theirs)["pooler.dense.weight"]
    data = classify_file(tmp_path / "data.jsonl")
    assert torch.equal(open_model(theirs).pooler["weight"], pooler)
    run = tmp_path / "run"
    argv = ["--task", "classify", "--data", data, "--steps", 1, "--method", "lora", *FAST, "--optim.lr", 1e-9]
    done = minillm(capsys, "finetune", tmp_path / "imported", *argv, "--out", run)
    assert done.code == 0, done.err
    opened = open_model(run)
    assert opened.model.head_config.pooler and (opened.model.pooler.weight - pooler).abs().max() < 1e-6
    assert opened.pooler.keys() == {"weight", "bias"}
    assert export_command([str(run), "--out", str(tmp_path / "out")]) == 0
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert opened.config.id2label == {0: "blue", 1: "red"}
    assert minillm(capsys, "import", tmp_path / "out", "--out", tmp_path / "again").code == 0
    for name, folder in (("finetune", "again"), ("train", "imported")):
        resumed = minillm(capsys, name, "--resume", tmp_path / folder)
        assert resumed.code == 2 and "was imported and holds no training to go on with" in resumed.err
    answers = [
        [json.loads(line) for line in minillm(capsys, "predict", model, "--input", data).out.splitlines()]
        for model in (run, tmp_path / "out", tmp_path / "again")
    ]
    for row, (first, second, third) in enumerate(zip(*answers, strict=True)):
        assert first["label"] == second["label"] == third["label"], row
        assert second["scores"] == third["scores"]
        assert first["scores"] == pytest.approx(second["scores"], abs=1e-4)
    evaluated = [
        json.loads(minillm(capsys, "evaluate", model, "--data", data, "--json").out)
        for model in (run, tmp_path / "out")
    ]
    assert evaluated[0]["loss"] == pytest.approx(evaluated[1]["loss"], abs=1e-4)


def test_an_imported_pooler_goes_out_with_the_body(tmp_path: Path, capsys) -> None:
    tokenizer = wordpiece()
    theirs = save(make("bert", "BertModel", vocab_size=tokenizer.vocab_size), tmp_path / "theirs")
    tokenizer.save(theirs)
    assert export_command([str(theirs), "--out", str(tmp_path / "out")]) == 0
    before, after = tensors_of(theirs), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert "pooler" not in capsys.readouterr().err
    whole = save(make("bert", "BertForPreTraining", vocab_size=tokenizer.vocab_size), tmp_path / "whole")
    tokenizer.save(whole)
    assert export_command([str(whole), "--out", str(tmp_path / "masked")]) == 0
    assert "the pooler that the model came with is left out: BertForMaskedLM has none" in capsys.readouterr().err


def test_outputs_of_other_shapes_are_no_small_difference() -> None:
    """They would be spread over each other."""
    verification._compare("Model", torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"the exported Model gives \(2, 1\), not \(2, 3\)"):
        verification._compare("Model", torch.zeros(2, 1), torch.zeros(2, 3))


def test_a_method_that_transformers_lacks_is_refused(tmp_path: Path, capsys) -> None:
    tokenizer = tokenizer_of("bpe")
    model = model_of("llama", tokenizer.vocab_size)
    for method in ("adapter", "prefix", "prompt"):
        run = finetuned_run(tmp_path / method, model, tokenizer, {"method": method, "length": 3})
        done = minillm(capsys, "export", run, "--out", tmp_path / "out")
        assert done.code == 2 and f"method={method}" in done.err and done.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_the_head_of_a_folder_is_built(tmp_path: Path) -> None:
    theirs_in(tmp_path, "bert", "SequenceClassification")
    found, _ = load_hf(tmp_path)
    assert isinstance(build(found), TaskModel) and found.pooler is not None
