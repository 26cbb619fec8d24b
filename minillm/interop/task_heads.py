"""Classifiers, taggers and answerers of Hugging Face's: which head of theirs is which of ours, read in both directions.

    …ForSequenceClassification   classify, regress   BERT: its pooler, then a linear layer; Llama, Qwen3, GPT-2: the
                                                     last state, then a linear layer without a bias
    …ForTokenClassification      tag                 a linear layer on every state
    …ForQuestionAnswering        span-qa             the same with two outputs

config.json names the labels (id2label) and what they are (problem_type). What it has no field for stands there under
`minillm`: thresholds that were tuned, and whether a question may have no answer.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minillm.config import UserError
from minillm.interop.configs import Fields
from minillm.model.heads import HeadConfig, TaskModel

OWN = "minillm"
_KINDS = {
    "single_label_classification": "classify",
    "multi_label_classification": "classify",
    "regression": "regress",
}


@dataclass(frozen=True)
class TaskHead:
    """A head of theirs."""

    family: str
    task: Literal["classify", "tag", "span-qa"]
    module: str
    """The linear layer's name."""
    pool: Literal["cls", "last"] | None = None
    pooler: bool = False
    bias: bool = True
    prefix: str = ""
    """What stands before the body's names, where it is another than the family's."""


TASK_HEADS = {
    "BertForSequenceClassification": TaskHead("bert", "classify", "classifier", pool="cls", pooler=True),
    "BertForTokenClassification": TaskHead("bert", "tag", "classifier"),
    "BertForQuestionAnswering": TaskHead("bert", "span-qa", "qa_outputs"),
    "GPT2ForSequenceClassification": TaskHead("gpt2", "classify", "score", pool="last", bias=False),
    "GPT2ForTokenClassification": TaskHead("gpt2", "tag", "classifier"),
    "GPT2ForQuestionAnswering": TaskHead("gpt2", "span-qa", "qa_outputs"),
}
for _family, _title in (("llama", "Llama"), ("qwen3", "Qwen3")):
    TASK_HEADS |= {
        f"{_title}ForSequenceClassification": TaskHead(_family, "classify", "score", pool="last", bias=False),
        f"{_title}ForTokenClassification": TaskHead(_family, "tag", "score"),
        f"{_title}ForQuestionAnswering": TaskHead(_family, "span-qa", "qa_outputs", prefix="transformer."),
    }


# In


def read_task(head: TaskHead, hf: Fields, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json's `task` as a run of ours has it, the head's tensors and `threshold` under a `TaskModel`'s names).

    Takes the head's tensors out of `tensors`. Raises `UserError` by the name of what is missing or contradicts itself.
    """
    names = [f"{head.module}.{part}" for part in ("weight", "bias") if part == "weight" or head.bias]
    for name in names:
        if name not in tensors:
            raise UserError(f"{hf.where}: the tensor {name} is missing, which the architecture asks for")
    found = {name.rpartition(".")[2]: tensors.pop(name) for name in names}
    outputs = found["weight"].shape[0] if found["weight"].dim() == 2 else 0
    if not outputs or found.get("bias", found["weight"][:, 0]).shape != (outputs,):
        shapes = " and ".join(f"{part} {tuple(x.shape)}" for part, x in found.items())
        raise UserError(f"{hf.where}: {head.module} has a {shapes}, which is no linear layer")
    for part, tensor in found.items():
        if not tensor.is_floating_point():
            raise UserError(f"{hf.where}: {head.module}.{part} holds {tensor.dtype}, not floating-point numbers")
    name, info = _meaning(head, hf, outputs)
    own = hf.get(OWN, {}, dict)
    threshold = own.get("threshold", [None] * outputs)
    if (
        not isinstance(threshold, list)
        or len(threshold) != outputs
        or not all(x is None or isinstance(x, int | float) for x in threshold)
    ):
        raise UserError(f"{hf.where}: {OWN}.threshold is no list of {outputs} numbers; restore the file, or remove it")
    config = HeadConfig(outputs=outputs, pool=head.pool, pooler=head.pooler, bias=head.bias)
    weights = {f"task_head.{part}": tensor.float() for part, tensor in found.items()}
    weights["threshold"] = torch.tensor([torch.nan if x is None else float(x) for x in threshold])
    return {"name": name, "head": asdict(config), "info": info}, weights


def _meaning(head: TaskHead, hf: Fields, outputs: int) -> tuple[str, dict[str, Any]]:
    """(our task, what it knows of its outputs)"""
    if head.task == "span-qa":
        if outputs != 2:
            raise UserError(f"{hf.where}: {head.module} has {outputs} outputs, and an answer has a start and an end")
        return "span-qa", {"unanswerable": hf.get(OWN, {}, dict).get("unanswerable") is True}
    labels = _labels(hf, outputs)
    if head.task == "tag":
        return "tag", {"labels": labels}
    default = "regression" if outputs == 1 else "single_label_classification"
    kind = hf.get("problem_type", default, str)
    if kind not in _KINDS:
        raise UserError(f"{hf.where}: problem_type={kind[:40]} is not supported; there are {', '.join(_KINDS)}")
    if (outputs == 1) != (kind == "regression"):
        raise UserError(f"{hf.where}: problem_type={kind} with {outputs} outputs is not supported")
    if kind == "regression":
        return "regress", {"mean": 0.0, "std": 1.0}
    return "classify", {"labels": labels, "multi": kind.startswith("multi"), "counts": [1] * outputs}


def _labels(hf: Fields, outputs: int) -> list[str]:
    given = hf.get("id2label", {str(i): f"LABEL_{i}" for i in range(outputs)}, dict)
    labels = [given.get(str(i)) for i in range(outputs)]
    if len(given) != outputs or not all(isinstance(label, str) for label in labels) or len(set(labels)) < outputs:
        raise UserError(f"{hf.where}: id2label does not give each of the {outputs} outputs a name of its own")
    return labels


# Out


def counterpart(family: str, title: str, task: Mapping[str, Any]) -> str:
    """The architecture that computes what a model finetuned for `task` does.

    Raises `UserError` where there is none without custom code.
    """
    wanted, config = {"regress": "classify"}.get(task["name"], task["name"]), HeadConfig(**task["head"])
    name = next((name for name, head in TASK_HEADS.items() if (head.family, head.task) == (family, wanted)), None)
    if name is None:
        raise UserError(
            f"{title} has no model for {task['name']} in Hugging Face's format that computes what ours does"
        )
    head = TASK_HEADS[name]
    if (config.pool, config.pooler) != (head.pool, head.pooler):
        reads = {"cls": "the first state", "mean": "the mean of all states", "last": "the last state"}
        theirs = "the pooler: finetune with --pool pooler" if head.pooler else f"{reads[head.pool or '']}: --pool last"
        raise UserError(
            f"a head that reads {reads[config.pool or '']} cannot be written in Hugging Face's format: {name} reads "
            + theirs
        )
    return name


def write_task(name: str, model: TaskModel, task: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(what config.json says of the labels, the head's tensors under their names).

    Args:
        name: from `counterpart`.

    Raises `UserError` where their head has no bias and ours needs one.
    """
    head, info = TASK_HEADS[name], task["info"]
    weight = model.task_head.weight.detach().float().cpu()
    bias = torch.zeros(len(weight)) if model.task_head.bias is None else model.task_head.bias.detach().float().cpu()
    entries, own = _entries(head, task), {}
    if task["name"] == "regress":  # their logit is the number itself
        weight, bias = weight * info["std"], bias * info["std"] + info["mean"]
    tensors = {f"{head.module}.weight": weight}
    if head.bias:
        tensors[f"{head.module}.bias"] = bias
    elif bias.any():
        why = "the mean of the numbers" if task["name"] == "regress" else "the head's bias"
        raise UserError(f"{name} has no bias, so {why} has no place there; finetune an encoder with --pool pooler")
    if not model.threshold.isnan().all():
        own["threshold"] = [None if x != x else x for x in model.threshold.tolist()]
    if task["name"] == "span-qa":
        own["unanswerable"] = info["unanswerable"]
    return entries | ({OWN: own} if own else {}), tensors


def _entries(head: TaskHead, task: Mapping[str, Any]) -> dict[str, Any]:
    info = task["info"]
    if task["name"] == "regress":
        return {"problem_type": "regression", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if task["name"] == "span-qa":
        return {}
    labels = info["labels"]
    entries: dict[str, Any] = {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if task["name"] == "classify":
        entries["problem_type"] = "multi_label_classification" if info["multi"] else "single_label_classification"
    return entries
