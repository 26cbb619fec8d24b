"""Opens any MODEL: a run folder, a checkpoint folder, or what `best` names."""

from pathlib import Path

import torch

from minillm.config import DamagedFile, ModelConfig, UserError, from_dict
from minillm.model.transformer import Transformer
from minillm.training import checkpoint
from tokenizer import DamagedFile as DamagedTokenizer
from tokenizer import Tokenizer


def load(path: str | Path, *, device: str | torch.device = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model, ready to predict, and its tokenizer; every file is verified first.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, or RUN/checkpoints/best.

    Raises:
        UserError: there is no model there. DamagedFile: a file is not what was written.
    """
    folder = checkpoint.resolve(Path(path))
    config = model_config(folder)
    with torch.device("meta"):  # no weight is drawn only to be overwritten
        model = Transformer(config)
    try:
        model.load_state_dict(checkpoint.load_weights(folder), assign=True)
    except RuntimeError as error:
        raise DamagedFile(
            f"{folder}: weights and config.json do not fit: {str(error).splitlines()[-1].strip()}"
        ) from error
    return model.to(device).eval(), load_tokenizer(folder / "tokenizer")


def model_config(folder: Path) -> ModelConfig:
    """The model's settings of a checkpoint."""
    try:
        return from_dict(ModelConfig, checkpoint.load_config(folder)["settings"]["model"], "model.")
    except (KeyError, TypeError) as error:
        raise DamagedFile(f"{folder / 'config.json'} is damaged: it holds no model") from error


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """`Tokenizer.load` with this package's errors."""
    try:
        return Tokenizer.load(folder)
    except DamagedTokenizer as error:
        raise DamagedFile(str(error)) from error
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error
