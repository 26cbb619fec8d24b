"""`export --format peft`: opened by PEFT on the base beside it, the same outputs; and what PEFT has no place for."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minillm.config import UserError
from minillm.interop.export import Beside, content_of
from minillm.interop.hf import build, read_hf
from minillm.interop.peft import export_adapter, places
from minillm.loading import open_model
from minillm.model.heads import TaskModel
from minillm.peft.config import MethodConfig
from minillm.peft.files import load
from minillm.peft.inject import Adapted, inject
from tests.finetuning import minillm
from tests.interop.ours import finetuned_run, model_of, tokenizer_of
from tests.interop.test_export import open_model as open_base
from tests.interop.test_task_models import finetuned
from tests.interop.theirs import output
from tests.peft.helpers import move

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of third parties about themselves, at import
    peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match.*lora_E:RuntimeWarning"),
]
LORA = {"method": "lora", "rank": 3, "alpha": 5.0}
ADALORA = {"method": "adalora", "rank": 2, "initial_rank": 3}
PREFIX = {"method": "prefix", "length": 3}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, LORA) for family in ("gpt2", "llama", "qwen3", "bert", "bart")),
    *((family, ADALORA) for family in ("gpt2", "llama", "bert")),
    *((family, PREFIX) for family in ("gpt2", "llama", "qwen3")),
    ("llama", {"method": "prompt", "length": 3}),
]


@pytest.fixture(scope="module")
def bpe():
    return tokenizer_of("bpe")


def adapted_of(family: str, method: dict[str, Any], vocab_size: int) -> Adapted:
    adapted = inject(model_of(family, vocab_size), MethodConfig(**method))
    move(adapted.model)
    if adapted.allocator is not None:  # ranks that differ
        for i, layer in enumerate(adapted.allocator.layers.values()):
            layer.kept.copy_(torch.tensor([i % 3 == 1, i % 2 == 1, True]))
            layer.lora_E.data[~layer.kept] = 0.0
    adapted.model.eval()
    return adapted


@pytest.mark.parametrize(("family", "method"), CASES, ids=lambda x: x if isinstance(x, str) else x["method"])
def test_peft_computes_the_same_on_the_exported_base(family: str, method: dict[str, Any], bpe, tmp_path: Path) -> None:
    adapted = adapted_of(family, method, bpe.vocab_size)
    out = tmp_path / "out"
    export_adapter(adapted, bpe, out)
    plain = open_base(out / "base", family)
    ids, source = torch.randint(bpe.vocab_size, (2, 2, 11))
    both = {"input_ids": source, "decoder_input_ids": ids} if family == "bart" else {"input_ids": ids}
    without = output(plain, **both)
    with torch.no_grad():
        expected = adapted.model(ids, **({"source": source} if family == "bart" else {}))
    actual = output(peft.PeftModel.from_pretrained(plain, out).eval(), **both)[:, -11:]
    assert (actual - expected).abs().max() < 1e-4
    assert (without - expected).abs().max() > 0.05  # the adapter is not in the base already
    values = json.loads((out / "adapter_config.json").read_text())
    assert values["base_model_name_or_path"] == "./base"
    again = load(build(read_hf(out / "base")), out, rename=places(content_of(plain_of(adapted))).__getitem__)
    with torch.no_grad():
        back = again.model(ids, **({"source": source} if family == "bart" else {}))
    assert (back - expected).abs().max() < 1e-4


def plain_of(adapted: Adapted) -> torch.nn.Module:
    return type(adapted.transformer)(adapted.transformer.config)


@pytest.mark.parametrize(("family", "task"), [("bert", "classify"), ("llama", "tag"), ("qwen3", "span-qa")])
def test_a_head_goes_out_in_the_base(family: str, task: str, bpe, tmp_path: Path) -> None:
    import transformers

    model, section = finetuned(family, task, bpe.vocab_size)
    adapted = inject(model, MethodConfig(**LORA), extra=model.added)
    move(model)
    export_adapter(adapted, bpe, tmp_path / "out", Beside(task=section))
    kind = {"tag": "TokenClassification", "span-qa": "QuestionAnswering"}.get(task, "SequenceClassification")
    plain = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "out" / "base")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "out").eval()
    ids = torch.randint(5, bpe.vocab_size, (2, 9))
    with torch.no_grad():
        out, expected = theirs(input_ids=ids), model(ids)
    actual = torch.stack((out.start_logits, out.end_logits), -1) if task == "span-qa" else out.logits
    assert (actual - expected).abs().max() < 1e-4
    assert isinstance(adapted.model, TaskModel) and adapted.grown  # what was given keeps its method


def test_a_folder_that_was_moved_opens_by_its_name_alone(bpe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapted_of("llama", LORA, bpe.vocab_size)
    export_adapter(adapted, bpe, tmp_path / "first" / "out")
    assert str(tmp_path) not in (tmp_path / "first" / "out" / "adapter_config.json").read_text()
    (tmp_path / "first").rename(tmp_path / "second")
    monkeypatch.chdir(tmp_path / "second" / "out")
    ids = torch.randint(bpe.vocab_size, (2, 9))
    with torch.no_grad():
        actual = peft.AutoPeftModelForCausalLM.from_pretrained(".").eval()(input_ids=ids).logits
        assert (actual - adapted.model(ids)).abs().max() < 1e-4


def test_an_adapter_that_differs_leaves_nothing(bpe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minillm.interop import peft as module

    right = module.exchange.write

    def wrong(*arguments):
        tensors, values = right(*arguments)
        return tensors, {**values, "lora_alpha": 2 * values["lora_alpha"]}

    monkeypatch.setattr(module.exchange, "write", wrong)
    with pytest.raises(UserError, match="the exported LlamaForCausalLM differs by"):
        export_adapter(adapted_of("llama", LORA, bpe.vocab_size), bpe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "method", "said"),
    [
        ("llama", {"method": "adapter"}, "method=adapter has no place in PEFT's format"),
        ("llama", {"method": "full"}, "method=full has no place in PEFT's format"),
        ("bert", PREFIX, "method=prefix has no place in PEFT's format"),
    ],
)
def test_what_peft_lacks_is_refused(family: str, method: dict[str, Any], said: str, bpe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        export_adapter(adapted_of(family, method, bpe.vocab_size), bpe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_prefix_under_a_head_is_refused(bpe, tmp_path: Path) -> None:
    model, section = finetuned("llama", "classify", bpe.vocab_size)
    adapted = inject(model, MethodConfig(**PREFIX), extra=model.added)
    with pytest.raises(UserError, match="method=prefix for a task with a head has no place"):
        export_adapter(adapted, bpe, tmp_path / "out", Beside(task=section))


def test_the_command_in_both_formats(bpe, tmp_path: Path, capsys) -> None:
    """A LoRA run: merged as hf, apart as peft; the same logits, and the base of peft is what the run began with."""
    start = model_of("llama", bpe.vocab_size)
    run = finetuned_run(tmp_path / "run", start, bpe, LORA)
    for name in ("hf", "peft"):
        done = minillm(capsys, "export", run, "--format", name, "--out", tmp_path / name)
        assert done.code == 0, done.err
        assert "split_special_tokens" in done.err
    ids = torch.randint(bpe.vocab_size, (2, 9))
    with torch.no_grad():
        expected, before = open_model(run).model(ids), start(ids)
    plain = open_base(tmp_path / "peft" / "base", "llama")
    assert (output(plain, input_ids=ids) - before).abs().max() < 1e-4
    assert (output(open_base(tmp_path / "hf", "llama"), input_ids=ids) - expected).abs().max() < 1e-4
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft").eval()
    assert (output(theirs, input_ids=ids) - expected).abs().max() < 1e-4
    assert (before - expected).abs().max() > 0.05
    assert all(".lora_" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    done = minillm(capsys, "export", tmp_path / "hf", "--format", "peft", "--out", tmp_path / "other")
    assert done.code == 2 and "was not finetuned here" in done.err
