"""--profile: the parts are a step's time, each is what it says, and the report shows them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, record_function

from minillm import ops, preflight
from minillm.config import Settings, from_dict
from minillm.training import breakdown, profile, roofs
from minillm.training.breakdown import Breakdown, Part
from minillm.training.profile import ATTENTION, DATA, IDLE, LOSS, NORMS, OPTIMIZER, PARTS, PRODUCTS, STEPS, Profile
from minillm.training.run import read_config
from tests.training.running import TINY, train

WIDER = ["--model.dim", "64", "--model.context", "64", "--train.eval-every", "100", "--train.sample-tokens", "1"]


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("profiled") / "run"
    from minillm.cli import run as command

    argv = ["--data", text, "--out", folder, *TINY, *WIDER, "--steps", STEPS + 1, "--profile"]
    assert command("train", [str(arg) for arg in argv]) == 0
    return folder


def test_the_parts_add_up_to_the_step(profiled: Path) -> None:
    found = breakdown.read(profiled)
    assert found is not None and [part.name for part in found.parts] == list(PARTS)
    assert sum(part.milliseconds for part in found.parts) == pytest.approx(found.milliseconds, rel=0.03)
    times = {part.name: part.milliseconds for part in found.parts}
    assert all(times[name] > 0 for name in (PRODUCTS, ATTENTION, NORMS, LOSS, OPTIMIZER, DATA, IDLE))
    assert 0.3 < found.milliseconds / found.unrecorded < 30 and found.steps == profile.RECORDED


def test_the_work_is_the_models_formula(profiled: Path) -> None:
    found = breakdown.read(profiled)
    assert found is not None
    model = from_dict(Settings, read_config(profiled)["settings"]).model
    work = {part.name: part.flops for part in found.parts}
    tokens = 4 * 64
    counts = preflight.parameters(model)
    assert found.tokens == tokens and work[PRODUCTS] == tokens * 6 * sum(counts.values())  # tied, RoPE: all multiply
    assert work[ATTENTION] == tokens * 12 * 64 * 64 / 2  # one layer; half of the keys are hidden
    assert found.flops == tokens * preflight.flops_per_token(model) == work[PRODUCTS] + 2 * work[ATTENTION]
    moved = {part.name: part.bytes for part in found.parts}
    assert moved[OPTIMIZER] == pytest.approx(28 * sum(counts.values()), rel=0.01)  # AdamW in fp32
    stream, heads = tokens * 64 * 4, tokens * 32 * 3 * 4  # three norms with residual; two query heads, one of keys
    assert moved[NORMS] == pytest.approx(2 * (3 * 4 * stream + 2 * heads), rel=0.1)


def test_the_trace_opens_and_the_report_has_a_section(profiled: Path) -> None:
    with gzip.open(profiled / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names and f"minillm: {NORMS}" in names
    page = (profiled / "report.html").read_text()
    assert "Where a step goes" in page and f"<td>{OPTIMIZER}" in page


def test_a_run_that_is_too_short_is_told_so(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(capsys, "--data", text, "--out", tmp_path / "run", *TINY, "--steps", STEPS - 1, "--profile")
    assert done.code == 2 and f"records step {STEPS - 2} to {STEPS}, and this run has {STEPS - 1}" in done.err
    assert not (tmp_path / "run").exists()


def recorded(work: Callable[[], None], **options: object) -> dict[str, float]:
    """Shares of the parts in one recorded step."""
    watch = Profile(
        run=Path(), device=torch.device("cpu"), dtype="fp32", flops={}, whole_flops=0.0, tokens=0,
        compiled=False, say=print,
    )  # fmt: skip
    work()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorder:
        work()  # outside of a step: counts nowhere
        with record_function("minillm: step"), watch._marked_operators():
            work()
    times, _ = profile.attribute(recorder.events(), on_gpu=False)
    return {part: time / sum(times.values()) for part, time in times.items()}


def test_forward_and_backward_of_each_operator_are_one_part() -> None:
    x = torch.randn(64, 512, 64, requires_grad=True)
    weight, matrix = (torch.randn(*shape, requires_grad=True) for shape in ((64,), (512, 64)))
    heads = x.view(32, 2, 512, 64)
    angles = torch.randn(512, 32)
    targets = torch.randint(512, (64 * 512,))
    cases = {
        NORMS: lambda: ops.rms_norm(x, weight, eps=1e-6, residual=x)[0].sum().backward(),
        ATTENTION: lambda: ops.attention(heads, heads, heads, causal=True).sum().backward(),
        PRODUCTS: lambda: torch.nn.functional.linear(x, matrix).sum().backward(),
    }
    for part, work in cases.items():
        assert leading(recorded(work)) == part
    assert leading(recorded(lambda: ops.rope(heads, heads, angles, angles)[0].sum().backward())) == NORMS
    head = recorded(lambda: ops.linear_cross_entropy(x.flatten(0, 1), matrix, targets).backward())
    assert (
        head[PRODUCTS] > 0 and head[LOSS] > 0 and leading({**head, PRODUCTS: head[PRODUCTS] + head[LOSS]}) == PRODUCTS
    )


def leading(shares: dict[str, float]) -> str:
    """The part that took most, however busy the machine is."""
    return max(shares, key=lambda part: shares[part])


def test_the_update_belongs_to_the_optimizer_products_too() -> None:
    matrix = torch.nn.Parameter(torch.randn(512, 256))
    matrix.grad = torch.randn_like(matrix)
    muon, adamw = torch.optim.Muon([matrix]), torch.optim.AdamW([matrix], fused=True)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_([matrix], 1.0)
        muon.step()
        adamw.step()

    assert leading(recorded(update)) == OPTIMIZER
    flops, moved = profile.update_work([muon])
    assert flops == 5 * (4 * 256 * 256 * 512 + 2 * 256**3) and moved == 20 * 512 * 256
    assert profile.update_work([adamw]) == (0.0, 28 * 512 * 256)


def test_what_a_person_reads(tmp_path: Path) -> None:
    parts = (Part(name=PRODUCTS, milliseconds=50.0, flops=25e9), Part(name="<b>", milliseconds=50.0))
    found = Breakdown(
        parts=parts, milliseconds=100.0, unrecorded=80.0, steps=3, tokens=1000, flops=40e9, device="cpu", dtype="bf16",
        matrix_rate=1e12, copy_rate=1e10, slowest=(("aten::mm", 50.0),),
    )  # fmt: skip
    assert found.mfu == pytest.approx(0.5)
    shown = breakdown.text(found, tmp_path / "trace.json.gz").splitlines()
    assert shown[3].split() == ["matrix", "products", "50.00", "50.0", "%", "25.0", "GFLOP", "50", "%"]
    assert "1,000 tokens takes 80.0 ms, 12,500 tokens/s; MFU 50.0 %" in shown[1] and "(+25 %)" in shown[1]
    assert shown[5].strip() == breakdown.NOTE and "slowest operators: aten::mm 50.0 ms" in shown[6]
    breakdown.write(tmp_path, found)
    assert breakdown.NOTE in breakdown.section(tmp_path)
    assert breakdown.read(tmp_path) == found and "&lt;b&gt;" in breakdown.section(tmp_path)
    (tmp_path / "profile.json").write_text('{"parts": 3}')
    assert breakdown.read(tmp_path) is None and breakdown.section(tmp_path) == ""


def test_a_roof_is_the_fastest_run_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 10, 14, 20, 23, 30, 35])
    monkeypatch.setattr(roofs.time, "perf_counter", lambda: float(next(clock)))
    assert roofs._shortest(lambda: None, torch.device("cpu")) == 3.0
