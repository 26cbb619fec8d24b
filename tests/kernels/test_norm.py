"""How the norms' kernels are launched: width classes, and how many programs share the rows."""

import torch

from kernels._norm import persistent_programs, width_class

CPU = torch.device("cpu")  # counts as 4 multiprocessors


def test_a_width_takes_the_next_power_of_two_within_bounds() -> None:
    assert [width_class(N) for N in (1, 128, 129, 1000, 1024, 1025)] == [
        "n128",
        "n128",
        "n256",
        "n1024",
        "n1024",
        "n2048",
    ]
    assert [width_class(N) for N in (32_768, 32_769, 10**6)] == ["n32768"] * 3


def test_all_programs_of_the_grid_are_resident_and_none_is_idle() -> None:
    rows = 10**6
    assert [persistent_programs(rows, 1, each, 1, CPU) for each in (1, 2, 8)] == [4, 8, 32]
    assert [persistent_programs(rows, 1, 2, chunks, CPU) for chunks in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]
    assert [persistent_programs(n, 4, 2, 1, CPU) for n in (0, 1, 4, 5, 32, 33)] == [1, 1, 1, 2, 8, 8]
