"""Settings: frozen dataclasses, five sections (model, tokenizer, data, optim, train) and the run they add up to.

Values are checked where they are made: an impossible combination raises `UserError`, which names the field.
`None` means off, or "follows from the others"; the docstring under each field says which.
"""

from minillm.config.model import (
    AttentionConfig,
    MLPConfig,
    MLPKind,
    ModelConfig,
    NormConfig,
    PositionConfig,
    SpeedrunConfig,
)
from minillm.config.run import DataConfig, Kernels, OptimConfig, Settings, TokenizerConfig, TrainConfig
from minillm.config.strict import DamagedFile, UserError, from_dict, merge, to_dict

__all__ = [
    "AttentionConfig", "DamagedFile", "DataConfig", "Kernels", "MLPConfig", "MLPKind", "ModelConfig", "NormConfig",
    "OptimConfig", "PositionConfig", "Settings", "SpeedrunConfig", "TokenizerConfig", "TrainConfig", "UserError",
    "from_dict", "merge", "to_dict",
]  # fmt: skip
