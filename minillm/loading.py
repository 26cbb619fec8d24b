"""Opens any MODEL: a run folder, a checkpoint folder, what `best` names, or a folder in Hugging Face's format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import DamagedFile, ModelConfig, UserError, from_dict
from minillm.interop.folder import is_hf, refuse_adapter
from minillm.model.heads import HeadConfig, TaskModel
from minillm.model.shapes import shapes_alone
from minillm.model.transformer import Transformer
from minillm.peft.config import MethodConfig
from minillm.peft.inject import Adapted, inject
from minillm.training import checkpoint
from tokenizer import DamagedFile as DamagedTokenizer
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """A MODEL and what its config.json says of it."""

    model: nn.Module
    """A Transformer, or a `TaskModel` around one; in evaluation mode."""
    tokenizer: Any
    folder: Path
    config: dict[str, Any]
    """config.json of the checkpoint; of a folder in Hugging Face's format what an import of it would say."""
    pooler: dict[str, Tensor] | None = None
    """Weight and bias of BERT's pooler, where the model came with one: a classifier's head begins with it."""
    adapted: Adapted | None = None
    """The method of a finetuned model of ours, where it is still in the model."""

    @property
    def transformer(self) -> Transformer:
        return self.model.transformer if isinstance(self.model, TaskModel) else self.model  # type: ignore[return-value]

    @property
    def start(self) -> list[int]:
        """What the decoder of an encoder-decoder begins with: as an imported config says, finetuned for `seq2seq` or
        not, and else with the document's token."""
        said = self.config.get("imported", {}).get("start") or self.config.get("task", {}).get("start")
        return said or [self.tokenizer.document_id]

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The ids before and behind what the encoder of an encoder-decoder reads: those of a row of `seq2seq` where it
        was finetuned for that, those of an imported tokenizer's template, and none in pretraining here."""
        tokenizer = self.tokenizer
        if "imported" not in self.config:
            task = self.config.get("task", {})
            before, behind = task.get("frame") or ([tokenizer.document_id], [tokenizer.end_id])
            return (before, behind) if task.get("name") == "seq2seq" else ([], [])
        text, wrapped = tokenizer.encode("a"), tokenizer.wrap("a")
        at = next((i for i in range(len(wrapped)) if wrapped[i : i + len(text)] == text), 0)
        return wrapped[:at], wrapped[at + len(text) :]


def load(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Transformer, Any]:
    """The Transformer, ready to predict, and its tokenizer; every file is verified first.

    Of a finetuned model the method is in it (LoRA and AdaLoRA folded into the weights), a task's head is not: see
    `open_model`.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, RUN/checkpoints/best, or a folder in Hugging
            Face's format.

    Raises:
        UserError: there is no model there. DamagedFile: a file is not what was written.
    """
    opened = open_model(path, device=device)
    return opened.transformer, opened.tokenizer


def open_model(path: str | Path, *, device: str | torch.device = "cpu", merge: bool = True) -> Opened:
    """As `load`, with the task's head where the model has one.

    Args:
        merge: LoRA and AdaLoRA are folded into the weights; else they stay in the model, beside these.
    """
    refuse_adapter(Path(path))
    if is_hf(Path(path)):
        from minillm.interop import hf

        found, tokenizer = hf.load_hf(path)
        section: dict[str, Any] = {} if found.task is None else {"task": found.task}
        section["imported"] = {"start": found.start}
        return Opened(hf.build(found).to(device), tokenizer, Path(path), section, found.pooler)
    folder = checkpoint.resolve(Path(path))
    config, shape, weights = checkpoint.load_config(folder), model_config(folder), checkpoint.load_weights(folder)
    try:
        adapted = _adapted(shape, config, weights) if "task" in config else None
        model = _plain(shape, weights) if adapted is None else adapted.model
    except UserError as error:
        raise DamagedFile(f"{folder / 'config.json'} is damaged: {error}") from error
    except (RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()  # of every key that is missing or surplus, a long line
        raise DamagedFile(f"{folder}: weights and config.json do not fit: {reason[:200]}") from error
    if merge and adapted is not None and adapted.config.method in ("lora", "adalora"):
        adapted.merge()
    model.requires_grad_(True)
    tokenizer, pooler = load_tokenizer(folder / "tokenizer"), _pooler(model, config, folder)
    return Opened(model.to(device).eval(), tokenizer, folder, config, pooler, adapted)


def _pooler(model: nn.Module, config: dict[str, Any], folder: Path) -> dict[str, Tensor] | None:
    """That of a finetuned model's head, or the one that an import set aside."""
    if isinstance(model, TaskModel):
        return None if model.pooler is None else dict(model.pooler.state_dict())
    return checkpoint.load_state(folder).get("pooler") if "imported" in config else None


def _plain(shape: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
    with shapes_alone():
        model = Transformer(shape)
    model.load_state_dict(weights, assign=True)
    return model


def _adapted(shape: ModelConfig, config: dict[str, Any], weights: dict[str, Tensor]) -> Adapted:
    """Head and method are put in as they were for training."""
    head, method = config["task"]["head"], from_dict(MethodConfig, config["method"], "method.")
    head = None if head is None else from_dict(HeadConfig, head, "task.head.")
    _require_room(shape, head, weights)
    model: nn.Module = Transformer(shape)
    if head is not None:
        model = TaskModel(model, head)
    adapted = inject(model, method, extra=model.added if isinstance(model, TaskModel) else ())
    model.load_state_dict(weights)
    return adapted


def _require_room(shape: ModelConfig, head: HeadConfig | None, weights: dict[str, Tensor]) -> None:
    """Raises `UserError` where config.json tells of more parameters than the weights are: they would be allocated."""
    with shapes_alone():
        told = sum(weight.numel() for weight in Transformer(shape).parameters())
    told += 0 if head is None else head.outputs * shape.dim
    there = sum(weight.numel() for weight in weights.values())
    if told > there:
        raise UserError(f"it tells of a model of {told:,} parameters, and the weights are {there:,}")


def model_config(folder: Path) -> ModelConfig:
    """The model's settings of a checkpoint."""
    try:
        return from_dict(ModelConfig, checkpoint.load_config(folder)["settings"]["model"], "model.")
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / 'config.json'} is damaged: it holds no model") from error


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a run or checkpoint, ours or one of the `tokenizers` library, with this package's errors."""
    if (Path(folder) / "tokenizer.json").is_file():
        from minillm.interop.hf_tokenizer import HFTokenizer

        return HFTokenizer.load(folder)
    try:
        return Tokenizer.load(folder)
    except DamagedTokenizer as error:
        raise DamagedFile(str(error)) from error
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
