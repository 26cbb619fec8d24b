"""What the benchmarks compute from what they measure: quantiles, work, fractions, errors, the choice of a winner."""

import numpy as np
import pytest
import torch

from benchmarks import errors, kernels, roofs, timing, tune
from benchmarks.families import rows


def test_quantiles_are_numpys():
    samples = list(np.random.default_rng(0).exponential(size=37))
    found = timing.summary(samples)
    assert found == pytest.approx({f"p{p}": np.quantile(samples, p / 100) for p in (20, 50, 80)}, rel=1e-12)
    assert timing.quantile([3.0], 0.2) == 3.0
    with pytest.raises(ValueError, match="nothing was measured"):
        timing.quantile([], 0.5)


def test_rates_turn_the_order_of_times_around():
    found = timing.summary_of_rates(10.0, [1000.0, 2000.0, 4000.0], "mb")
    assert found["mb_p50"] == 5.0 and found["samples"] == 3
    assert found["mb_p20"] == pytest.approx(2.5 + 0.4 * 2.5) and found["mb_p80"] == pytest.approx(5 + 0.6 * 5)


def test_providers_take_turns_and_one_that_fails_is_left_out():
    order = []

    def broken():
        order.append("c")
        raise RuntimeError("no kernel\nfor this")

    measures = {"a": lambda: order.append("a") or [1.0], "c": broken, "b": lambda: order.append("b") or [2.0, 3.0]}
    samples, failed = timing.interleaved(measures, rounds=3, pause=0)
    assert order == ["a", "c", "b", "a", "b", "a", "b"]
    assert samples == {"a": [1.0] * 3, "b": [2.0, 3.0] * 3}
    assert failed == {"c": "RuntimeError: no kernel"}


def test_copies_exceed_the_cache_together():
    assert timing.copies(200 * 10**6) == 1
    assert timing.copies(200 * 10**6 - 1) == 2
    assert timing.copies(50 * 10**6) == 4


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (roofs.visible_pairs(8, 8), 64),
        (roofs.visible_pairs(8, 8, causal=True), 32),
        (roofs.visible_pairs(4, 4, causal=True, window=1), 1 + 2 + 2 + 2),
        (roofs.visible_pairs(4, 4, causal=True, window=9), 1 + 2 + 3 + 4),
        (roofs.visible_pairs(8, 8, causal=True, documents=[2, 6]), (4 + 36) / 2),
        (roofs.attention_flops(2, 3, 5, 7, "forward"), 4 * 2 * 3 * 5 * 7),
        (roofs.attention_flops(2, 3, 5, 7, "backward"), 10 * 2 * 3 * 5 * 7),
        (roofs.attention_bytes(2, 6, 3, 5, 7, 4, 2, "forward"), 2 * (2 * 6 * 5 * 4 * 2 + 2 * 3 * 7 * 4 * 2)),
        (roofs.attention_bytes(2, 6, 3, 5, 7, 4, 2, "backward"), 4 * (2 * 6 * 5 * 4 * 2 + 2 * 3 * 7 * 4 * 2)),
        (roofs.norm_bytes(3, 5, 2, "forward", residual=False), 2 * 30),
        (roofs.norm_bytes(3, 5, 2, "forward", residual=True), 4 * 30),
        (roofs.norm_bytes(3, 5, 2, "backward", residual=False), 3 * 30),
        (roofs.norm_bytes(3, 5, 2, "backward", residual=True), 4 * 30),
        (roofs.rope_bytes(2, 3, 4, 1, 8, 2), 2 * 2 * 3 * 5 * 8 * 2),
        (roofs.gated_bytes(3, 5, 2, "forward"), 3 * 30),
        (roofs.gated_bytes(3, 5, 2, "backward"), 5 * 30),
        (roofs.cross_entropy_bytes(3, 5, 2), 2 * 30),
        (roofs.linear_cross_entropy_flops(3, 5, 7), 6 * 105),
        (roofs.decode_bytes(2, 3, 5, 7, 2), 2 * 2 * 3 * 5 * 7 * 2),
    ],
)
def test_work_by_hand(count, expected):
    assert count == expected


def test_gpt2s_attention_has_the_flops_of_its_papers_formula():
    pairs = roofs.visible_pairs(1024, 1024, causal=True)
    assert roofs.attention_flops(64, 12, 64, pairs, "forward") == 64 * 12 * 4 * 64 * 1024 * 1024 / 2


def test_a_fraction_of_the_roof():
    found = kernels.timed([1.0, 2.0, 3.0], work=4e9, kind="copy", roof=4e12)
    assert found == {
        "ms_p20": 1.4, "ms_p50": 2.0, "ms_p80": 2.6, "samples": 3, "gbps": 2000.0, "frac_roof": 0.5,
    }  # fmt: skip
    assert kernels.timed([1.0], work=5e11, kind="matmul", roof=1e15) | {} == {
        "ms_p20": 1.0, "ms_p50": 1.0, "ms_p80": 1.0, "samples": 1, "tflops": 500.0, "frac_roof": 0.5,
    }  # fmt: skip


def test_errors_and_their_gate():
    exact = {"output 0": torch.tensor([3.0, 4.0], dtype=torch.float64)}
    found = errors.error({"output 0": torch.tensor([3.0, 4.5])}, exact)
    assert found == {"output 0": {"max": 0.5, "relative": 0.1}}
    torchs = {"output 0": {"max": 0.2, "relative": 0.1}}
    assert errors.gate(found, torchs, exact, eps=0.0) == "output 0: max error 0.5, allowed 0.4"
    assert errors.gate(found, torchs, exact, eps=0.1) is None  # one rounding of 4.0 explains 0.4 more
    rough = {"output 0": {"max": 0.1, "relative": 0.13}}
    assert errors.gate(rough, torchs, exact, eps=0.0) == "output 0: relative error 0.13, allowed 0.12"
    broken = errors.error({"output 0": torch.tensor([3.0, float("nan")])}, exact)
    assert errors.gate(broken, torchs, exact, eps=1.0) == "output 0: NaN or infinity"


def test_a_wrong_kernel_is_caught_and_a_provider_that_raises_is_named():
    case = rows.norm("rms_norm", 7, 96, torch.float32, "backward", residual=True)

    def wrong(x, weight, residual):
        y, total = rows.NORMS["rms_norm"][0](x, weight, residual=residual)
        return y * 1.001, total

    def raises(**_):
        raise RuntimeError("not here")

    case.providers["wrong"], case.providers["raises"] = wrong, raises
    found = kernels.judged(case, torch.device("cpu"), only=("minillm", "wrong", "raises"))
    assert found["minillm"]["gate"] is None
    assert set(found["minillm"]["err"]) == {"output 0", "output 1", "d x", "d residual", "d weight"}
    assert found["wrong"]["gate"].startswith("output 0: max error")
    assert found["raises"] == {"failed": "RuntimeError: not here"}


def test_what_the_compiler_made_stands_beside_ours():
    case = rows.norm("rms_norm", 7, 1000, torch.bfloat16, "forward")
    table = [
        {"case": "rms_norm_forward/n1024/bfloat16", "registers": 64, "spills": 0, "shared": 1024},
        {"case": "rms_norm_forward/n1024/float16", "registers": 99, "spills": 8, "shared": 9999},
        {"case": "rms_norm_backward/n1024/bfloat16", "registers": 99, "spills": 8, "shared": 9999},
    ]
    assert kernels.codegen_figures(case, table) == {"regs": 64, "spills": 0, "smem": 1024}
    assert kernels.codegen_figures(case, []) == {}


def test_candidates_change_few_names_by_one_step():
    shipped = {"BLOCK": 1024, "num_warps": 4}
    one = tune.candidates(shipped, steps=1)
    assert one == [
        shipped,
        {"BLOCK": 512, "num_warps": 4},
        {"BLOCK": 2048, "num_warps": 4},
        {"BLOCK": 1024, "num_warps": 2},
        {"BLOCK": 1024, "num_warps": 8},
    ]
    two = tune.candidates(shipped, steps=2)
    assert len(two) == 9 and two[:5] == one and {"BLOCK": 512, "num_warps": 8} in two
    assert tune.candidates({"num_warps": 1}, steps=2) == [{"num_warps": 1}, {"num_warps": 2}]


def test_a_winner_must_leave_the_spread():
    shipped, other = {"BLOCK": 1024}, {"BLOCK": 512}
    own = {"choice": shipped, "ms_p20": 0.9, "ms_p50": 1.0, "ms_p80": 1.1}
    assert tune.winner(shipped, [own, {"choice": other, "ms_p20": 0.8, "ms_p50": 0.95, "ms_p80": 1.0}]) == shipped
    assert tune.winner(shipped, [own, {"choice": other, "ms_p20": 0.7, "ms_p50": 0.8, "ms_p80": 0.9}]) == other
    assert tune.winner(shipped, [{"choice": shipped, "fault": "spills"}, own | {"choice": other}]) == other
    assert tune.winner(shipped, []) == shipped
