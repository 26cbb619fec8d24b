"""Weights that hold no numbers are refused by name, whatever their type."""

import pytest
import torch

from minillm.config import UserError
from minillm.finite import require_finite


def test_numbers_of_any_type_are_taken() -> None:
    fits = {"int": torch.tensor([2**63 - 1]), "half": torch.tensor([65504.0]).half(), "none": torch.empty(0)}
    require_finite(fits | {"wide": torch.tensor([3e38], dtype=torch.float64)}, "file")


@pytest.mark.parametrize(
    "wrong", [torch.tensor([0.0, torch.nan, 1.0]), torch.tensor([1e39, 0, 0], dtype=torch.float64)]
)
def test_what_fp32_cannot_hold_is_refused_by_name_and_count(wrong: torch.Tensor) -> None:
    with pytest.raises(UserError, match="file: second holds NaN or infinity in 1 of 3 places"):
        require_finite({"first": torch.zeros(3), "second": wrong}, "file")
