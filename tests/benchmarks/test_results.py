"""Result files, what counts as finished, and the README's tables."""

import json

import pytest

from benchmarks import kernels, plots, records, tables, tune
from benchmarks.__main__ import main
from benchmarks.families import rows
from tests.benchmarks.made import ABOUT


def row(provider="minillm", ms=1.0, N=768, **other):
    figures = {"ms_p20": 0.9 * ms, "ms_p50": ms, "ms_p80": 1.2 * ms, "samples": 5, "gbps": 10.0, "frac_roof": 0.8 / ms}
    return {
        "kernel": "rms_norm", "shape": {"M": 16, "N": N}, "dtype": "bfloat16", "dir": "forward", "provider": provider,
        "mode": "gpu time", "roof": {"name": "copy", "rate": 1e12}, "gate": None, **figures, **ABOUT, **other,
    }  # fmt: skip


def test_a_file_is_an_array_with_a_row_on_each_line(tmp_path):
    path, rows = tmp_path / "deep/kernels.json", [row(), row("liger", 2.0)]
    records.save(path, rows)
    lines = path.read_text().splitlines()
    assert records.load(path) == rows == json.loads(path.read_text())
    assert [lines[0], lines[-1]] == ["[", "]"] and json.loads(lines[1].rstrip(",")) == rows[0] and len(lines) == 4
    assert records.load(tmp_path / "none.json") == [] and [p.name for p in path.parent.iterdir()] == ["kernels.json"]


def test_no_figure_is_nan_and_no_file_is_guessed_at(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.save(tmp_path / "a.json", [row(ms=float("nan"))])
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "b.json").write_text('[{"kernel": ')
    with pytest.raises(ValueError, match="is no result file"):
        records.load(tmp_path / "b.json")


def test_finished_means_these_sources_and_this_device():
    done, key = [row(), row("liger")], records.case_key(row())
    assert records.finished(done, "s1", "NVIDIA H200") == {key}
    assert records.finished(done, "s2", "NVIDIA H200") == records.finished(done, "s1", "NVIDIA A100") == set()
    assert key != records.case_key(row(N=1024)) and key != records.case_key(row(quick=True))
    assert key == records.case_key(row("eager"))  # all providers of a case are measured together
    new = [row(ms=3.0)]
    other = row(N=1024)
    assert records.merge([*done, other], new) == [other, *new]


def test_sources_change_with_a_kernel_and_with_nothing_else(tmp_path):
    for name in ("kernels/a.py", "kernels/tuned/a.json", "benchmarks/families/rows.py", "benchmarks/timing.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    before = records.sources(tmp_path)
    (tmp_path / "README.md").write_text("2")
    assert records.sources(tmp_path) == before and len(before) == 12
    (tmp_path / "kernels/tuned/a.json").write_text("2")
    assert records.sources(tmp_path) != before


def test_a_folder_for_each_device():
    assert records.slug("NVIDIA H200") == "h200"
    assert records.slug("AMD EPYC, 2 cores") == "amd-epyc-2-cores"


@pytest.mark.parametrize(("cores", "said"), [(1, "1 core"), (2, "2 cores")])
def test_a_processor_is_named_with_its_cores(cores, said, monkeypatch):
    monkeypatch.setattr(records.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(records, "_read", lambda _: "model name\t: AMD EPYC \n" * cores)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert records.device_name() == f"AMD EPYC, {said}"


def test_a_report_shows_losses_and_failures_too():
    text = kernels.report([row(), row("liger", 0.5), row("eager") | {"failed": "out of memory"}])
    assert "rms_norm forward bfloat16 M=16 N=768" in text.splitlines()[0]
    assert "1.0000 ms (0.9000 to 1.2000)  10 GB/s  80 % of copy" in text and "failed: out of memory" in text


README = "# A\n<!-- table:{} -->\nold\n<!-- /table -->\nend\n"


def test_the_kernel_table_names_the_best_peer(tmp_path):
    records.save(tmp_path / "h200/kernels.json", [row(), row("liger", 1.5), row("eager", 4.0), row(N=1024, ms=2.0)])
    text = tables.rewritten(README.format("kernels"), tmp_path)
    lines = text.splitlines()
    assert (
        "| rms_norm forward | M=16 N=768 | 1.000 (0.900 to 1.200) | 80 % | liger | 1.500 (1.350 to 1.800) | 1.50× |"
        in lines
    )
    assert "| rms_norm forward | M=16 N=1024 | 2.000 (1.800 to 2.400) | 40 % | – | – | – |" in lines
    assert "NVIDIA H200, GPU time. torch 2.13.0; 2026-01-02." in lines
    assert "old" not in lines and lines[0] == "# A" and lines[-1] == "end"
    assert tables.rewritten(text, tmp_path) == text


def test_the_codegen_table_has_the_most_of_each(tmp_path):
    made = [
        {"kernel": "rope", "arch": arch, "registers": r, "spills": s, "shared": m, "fault": None}
        for arch, r, s, m in (("sm_80", 40, 0, 1024), ("sm_80", 64, 8, 0), ("sm_90", 50, 0, 2048))
    ]
    records.save(tmp_path / "codegen.json", made)
    text = tables.rewritten(README.format("codegen"), tmp_path)
    assert "| kernel | sm_80 | sm_90 |" in text and "| `rope` | 64 / 8 / 1 | 50 / 0 / 2 |" in text
    assert "3 configurations, 0 with a fault" in text


def test_the_generation_and_tokenizer_tables(tmp_path):
    shape = {"B": 8, "prompt": 4, "new_tokens": 16, "cache": True}
    rates = {"tokens_p20": 1000.0, "tokens_p50": 2000.4, "tokens_p80": 2500.0}
    case = {"kernel": "generate gpt2", "shape": shape, "dtype": "bfloat16", "threads": 2, "roof": 20e9}
    made = [{**case, "provider": "minillm", **rates, "frac_roof": 0.254, **ABOUT}]
    made.append({**case, "provider": "transformers", "failed": "x", **ABOUT})
    records.save(tmp_path / "cpu/generation.json", made)
    text = tables.rewritten(README.format("generation"), tmp_path)
    assert "| gpt2, bfloat16, batch 8, cache | 16 | 2,000 (1,000 to 2,500) | – | 25 % |" in text
    speed = {"kernel": "speed of encode", "mb_p20": 1.0, "mb_p50": 2.0, "mb_p80": 3.0}
    kind = {"kernel": "compression of JSON", "kind": "JSON", "bytes_per_token": 2.5, "gpt2_bytes_per_token": 2.25}
    vocabulary = {"shape": {"vocab_size": 4096}, **ABOUT}
    records.save(tmp_path / "cpu/tokenizer.json", [speed | vocabulary, kind | vocabulary])
    text = tables.rewritten(README.format("tokenizer"), tmp_path)
    assert "| JSON | 2.50 | 2.25 |" in text and "encode 2.0 (1.0 to 3.0)" in text


def test_no_table_without_results(tmp_path):
    text = tables.rewritten(README.format("kernels"), tmp_path)
    assert "*Not measured yet: `python -m benchmarks kernels` on a GPU.*" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (README.format("kernel"), "there is no table 'kernel': did you mean kernels?"),
        ("<!-- table:codegen -->\n", "needs a <!-- /table -->"),
        (README.format("codegen") + "<!-- /table -->\n", "needs a <!-- /table -->"),
    ],
)
def test_a_wrong_marker_is_one_line(text, message, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main(["tables", "--readme", str(readme), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err and readme.read_text() == text


def test_the_command_writes_and_checks(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(README.format("codegen"))
    command = ["tables", "--readme", str(readme), "--out", str(tmp_path)]
    assert main([*command, "--check"]) == 1 and "old" in readme.read_text()
    assert main(command) == 0 and "Not measured yet" in readme.read_text()
    assert main([*command, "--check"]) == 0


def test_a_tuned_table_keeps_all_but_the_winners(tmp_path):
    path = tmp_path / "rope.json"
    path.write_text(json.dumps({"default": {"d64/float16": {"BLOCK": 1}, "d16/float16": {"BLOCK": 2}}}))
    tune.rewrite(path, "sm_90", {"d64/float16": {"BLOCK": 4}, "d16/float16": {"BLOCK": 2}})
    default = {"d64/float16": {"BLOCK": 1}, "d16/float16": {"BLOCK": 2}}
    assert json.loads(path.read_text()) == {"default": default, "sm_90": {"d64/float16": {"BLOCK": 4}}}
    tune.rewrite(path, "sm_90", {"d64/float16": {"BLOCK": 1}})  # back to the default's: the row must follow
    assert json.loads(path.read_text())["sm_90"] == {"d64/float16": {"BLOCK": 1}}
    assert '    "d64/float16": {"BLOCK": 1}' in path.read_text().splitlines()


def test_the_figures_bars_reach_from_p20_to_p80():
    letter, grouped = plots.panels([row(N=1024), row(), row("liger", 2.0)])
    assert letter == "N" and list(grouped) == ["bfloat16 M=16"]
    series = plots.points(grouped["bfloat16 M=16"], letter)
    assert [x for x, *_ in series["minillm"]] == [768, 1024]
    _, middle, below, above = series["liger"][0]
    assert (middle, below, above) == pytest.approx((0.4, 0.4 - 0.4 / 1.2, 0.4 / 0.9 - 0.4))


def test_equal_samples_have_no_error_bar_and_none_below_zero():
    same = [{"ms_p20": t / 7, "ms_p50": t / 7, "ms_p80": t / 7, "frac_roof": 1 / t, "shape": {"N": t}, "provider": "x"}
            for t in range(1, 200)]  # fmt: skip
    assert all(point[2:] == (0, 0) for point in plots.points(same, "N")["x"])


def test_figures_are_drawn(tmp_path):
    paths = plots.draw_all([row(), row("liger", 2.0), row("eager") | {"failed": "x"}], tmp_path)
    assert [path.name for path in paths] == ["rms_norm-forward-gpu-time.png"]
    assert paths[0].read_bytes()[:4] == b"\x89PNG"


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    measured = []

    def measure(case, rates, *, quick):
        measured.append(kernels.identity(case)["shape"]["N"])
        if len(measured) == 3:
            raise KeyboardInterrupt
        return [kernels.identity(case) | {"provider": "minillm", "mode": "gpu time", "failed": "x", "gate": None}]

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(records, "provenance", lambda *_: dict(ABOUT))
    monkeypatch.setattr(kernels.roofs, "preamble", lambda: {"rates": {"copy": 1.0}})
    monkeypatch.setattr(plots, "draw_all", lambda rows, out: [])
    dtype, widths = kernels.torch.bfloat16, (96, 128, 160)
    chosen = {"rms_norm": lambda scale: (rows.norm("rms_norm", 4, N, dtype, "forward") for N in widths)}
    options = {"quick": False, "minutes": 8.0}
    with pytest.raises(KeyboardInterrupt):
        kernels._on_gpu(chosen, tmp_path, **options)
    assert [row["shape"]["N"] for row in records.load(tmp_path / "h200/kernels.json")] == [96, 128]
    assert kernels._on_gpu(chosen, tmp_path, **options) == 1  # a kernel of ours that failed
    assert measured == [96, 128, 160, 160]
    assert len(records.load(tmp_path / "h200/roofs.json")) == 2  # the ceilings of either run
    kernels._on_gpu(chosen, tmp_path, **options)
    newer = ABOUT | {"sources": "s2"}
    monkeypatch.setattr(records, "provenance", lambda *_: dict(newer))
    kernels._on_gpu(chosen, tmp_path, quick=False, minutes=0.0)  # no time: nothing is begun
    assert len(measured) == 4
    kernels._on_gpu(chosen, tmp_path, **options)
    assert measured[4:] == [96, 128, 160] and len(records.load(tmp_path / "h200/kernels.json")) == 3
