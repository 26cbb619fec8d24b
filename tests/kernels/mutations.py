"""Would the tests notice? One-line changes of the kernels, each of which must make a test fail.

    python -m tests.kernels.mutations [FILE …]        tries those of the named kernel files (all), lists the survivors
    python -m tests.kernels.mutations --quick         five of them
    python -m tests.kernels.mutations --sample        forty of them, always the same ones

A change is applied to a copy of kernels/ and tests/kernels/ in a temporary folder, where that kernel's tests then run;
the checkout is never touched. `old` must occur exactly once in its file, so a refactoring that makes a change
meaningless is noticed too: give it the line that now does the same.

Left out are changes that cannot show on a CPU (int64 offsets past 2^31, block choices) and those that would make the
interpreter write outside a tensor.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Mutation(NamedTuple):
    """In kernels/<file>, `old` (one occurrence) becomes `new`, which the tests in tests/kernels/<tests> must notice."""

    file: str
    old: str
    new: str
    tests: str


CHANGES: dict[tuple[str, str], list[tuple[str, str]]] = {  # (file, tests): [(old, new)]
    ("cross_entropy.py", "test_cross_entropy.py"): [
        ("* LOG2E) * share - tl.where", "* LOG2E) * weight - tl.where"),
        ("_logits(x_ptr + y, known", "_logits(x_ptr + V - 1 - y, known"),
        ("m_new = tl.maximum(m, tl.max(z, 1))", "m_new = tl.max(z, 1)"),
        ('tl.where(m_new == -float("inf"), 0.0, m_new)', "m_new"),
        ("s = s * tl.exp2((m - shift) * LOG2E) + ", "s = s + "),
        ("loss = tl.log(s) + (m - z_y)", "loss = tl.log(s) - z_y"),
        ("loss = (1.0 - smoothing) * loss + ", "loss = loss + "),
        ("(m - tl.sum(total) / V))", "(m - tl.sum(total)))"),
        ("loss += z_loss * lse * lse", "loss += z_loss * lse"),
        ("slope = 1.0 + 2.0 * z_loss * lse", "slope = 1.0 + z_loss * lse"),
        ("tl.where(counts, loss * weight, 0.0)", "loss * weight"),
        ("slope / s * weight", "slope / s"),
        ("off = smoothing / V * weight", "off = 0.0 * weight"),
        ("weight = tl.where(counts, weight, 0.0)", "weight += 0.0"),
        ("g *= 1.0 - ratio * ratio", "g *= 1.0 - ratio"),
        ("known = counts & (y >= 0) & (y < V)", "known = counts & (y >= 0)"),
        ("x_ptr += row * x_stride", "x_ptr += row * V"),
    ],
    ("_scale_rows.py", "test_cross_entropy.py"): [
        ("factor = tl.load(factor_ptr + row * factor_stride)", "factor = tl.load(factor_ptr)"),
    ],
    ("linear_cross_entropy.py", "test_linear_cross_entropy.py"): [
        ("total.addmm_(a.float(), b.float())", "total.addmm_(a.float(), b.float(), beta=0)"),
        ("d_bias += logits.sum(0, dtype=torch.float32)", "d_bias = logits.sum(0, dtype=torch.float32)"),
        ("else row_weight[rows]", "else row_weight[: len(h)]"),
        ("d_weight = scaled(d_weight, upstream) if wanted[1]", "d_weight = d_weight if wanted[1]"),
        ("(M + 1) // 2))", "M))"),
        ("return loss / (targets != ignore_index).sum()", "return loss / (targets == targets).sum()"),
    ],
    ("decode_attention.py", "test_decode_attention.py"): [
        ("acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None],", "acc = tl.dot(p.to(v.dtype), v, acc,"),
        ("position = length - T + t", "position = length - T"),
        ("begin = tl.maximum(length - T - left, 0)", "begin = tl.maximum(length - left, 0)"),
        ("tl.cdiv(tl.cdiv(length - begin, splits), BLOCK_N)", "((length - begin) // splits // BLOCK_N)"),
        ("(s[None, :] <= position[:, None])", "(s[None, :] < position[:, None])"),
        ("(s[None, :] >= position[:, None] - left)", "(s[None, :] > position[:, None] - left)"),
        ("score = tl.where(visible, score * LOG2E,", "score = tl.where(visible, score,"),
        ("total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
        ("tl.where(seen, m + tl.log2(total),", "tl.where(seen, tl.log2(total),"),
        ("weight = tl.exp2(tl.load(lse_ptr + split) - m)", "weight = tl.exp2(tl.load(lse_ptr + split))"),
        ("acc += tl.sum(part * weight[:, None], 0)", "acc = tl.sum(part * weight[:, None], 0)"),
        ("h, t, exists = g * R + own // T, own % T,", "h, t, exists = g * R + own // T, own % R,"),
        ("slope = tl.load(slopes_ptr + h,", "slope = tl.load(slopes_ptr + own // T,"),
        ("k_ptr += b * k_b + g * k_g", "k_ptr += b * k_b"),
        ("(length < 0) | (length > S)", "length < 0"),
    ],
    ("rms_norm.py", "test_rms_norm.py"): [
        ("dx = inv_rms * (g - n * mean)", "dx = inv_rms * g"),
        ("squares += x * x", "squares += x"),
        ("(1.0 / N) + eps)  # [ROWS, 1]", "(1.0 / N))  # [ROWS, 1]"),
        ("mean = tl.sum(g * n, 1, keep_dims=True) * inv_n", "mean = tl.sum(g * n, 1, keep_dims=True)"),
        ("dw += dy * n", "dw += dy"),
        ("dx += tl.load(dtotal_ptr", "dx = tl.load(dtotal_ptr"),
        ("tl.sum(products) / N)", "tl.sum(products))"),
        ("M, programs * ROWS, num_stages", "M, ROWS, num_stages"),
        ("if chunks > 1:", "if chunks > 2:"),
    ],
    ("layer_norm.py", "test_layer_norm.py"): [
        ("tl.where(inside, x - mean, 0.0)", "x - mean"),
        ("mean = tl.sum(sums, 1, keep_dims=True) / N", "mean = tl.sum(sums, 1, keep_dims=True) / (N + 1)"),
        ("dx = inv_std * (g - mean_g - n * mean_gn)", "dx = inv_std * (g - n * mean_gn)"),
        ("db += dy", "db += g"),
        ("products += g * (x - mean) * inv_std", "products += g * x * inv_std"),
        ("mean_gn = tl.load(row_means_ptr + M + row,", "mean_gn = tl.load(row_means_ptr + row,"),
        ("if chunks > 1:", "if chunks > 2:"),
    ],
    ("rope.py", "test_rope.py"): [
        ("tl.store(y, x1 * cos - x2 * sin, inside)", "tl.store(y, x1 * cos + x2 * sin, inside)"),
        ("sin = -sin", "cos = -cos"),
        ("x1, x2 = x1 * inv_rms * w1, x2 * inv_rms * w2", "x1, x2 = x1 * inv_rms * w1, x2 * inv_rms * w1"),
        ("inside = (token < T) & (col < D // 2)", "inside = (token < T - 1) & (col < D // 2)"),
    ],
    ("_rope_norm.py", "test_rope.py"): [
        ("cos = tl.load(cos_ptr + token * (D // 2) + col,", "cos = tl.load(cos_ptr + col,"),
        ("du1, du2 = dy1 * cos + dy2 * sin,", "du1, du2 = dy1 * cos - dy2 * sin,"),
        ("mean = tl.sum(g1 * n1 + g2 * n2,", "mean = tl.sum(g1 * n1,"),
        ("dw2 += du2 * n2", "dw2 += du1 * n2"),
        ("load_angles(cos_ptr + b * cos_batch,", "load_angles(cos_ptr,"),
    ],
    ("swiglu.py", "test_swiglu.py"): [
        ("return x * s, s + x * slope", "return x * s, s + slope"),
        ("tl.erf(x * 0.7071067811865476)", "tl.erf(x * 0.7)"),
        ("x + 0.044715 * x * x * x", "x + 0.044715 * x * x"),
        ("(1.0 + 0.134145 * x * x)", "(1.0 + 0.044715 * x * x)"),
        ("tl.store(dup_ptr + row * F + col, dy * act, col < F)", "tl.store(dup_ptr + row * F + col, dy, col < F)"),
    ],
    ("_flash_forward.py", "test_flash_attention.py"): [
        ("acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None],", "acc = tl.dot(p.to(v.dtype), v, acc,"),
        ("total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)"),
        ("g = h // (H // G)", "g = h % G"),
        ("tl.where(seen, m + tl.log2(total),", "tl.where(seen, m + total,"),
        ("_ptr + h) * 1.4426950408889634", "_ptr + h)"),
    ],
    ("_flash_tiles.py", "test_flash_tiles.py"): [  # what costs time, and changes no result
        ("full_start = tl.minimum(full_start, stop)", "full_start = tl.maximum(full_start, stop)"),
        ("tl.maximum(low - back, 0) // OTHER", "0"),
        ("(other_low == low) & (other_high == high)", "(other_low > low) & (other_high == high)"),
    ],
    ("_norm.py", "test_norm.py"): [
        ("multiprocessors(device) * per_multiprocessor // chunks", "multiprocessors(device) // chunks"),
    ],
    ("_flash_tiles.py", "test_flash_attention.py"): [
        ("seen & (s >= position - row.left)", "seen & (s > position - row.left)"),
        ("seen & (s <= position + row.right)", "seen & (s < position + row.right)"),
        ("seen & (q_id == kv_id)", "seen & (q_id >= kv_id)"),
        ("score * row.factor - row.slope", "score * row.factor + row.slope"),
        ("full_stop = tl.maximum(tl.minimum(low + ahead + 1,", "full_stop = tl.maximum(tl.minimum(high + ahead + 1,"),
        ("stop = tl.maximum(tl.minimum(high + ahead + 1,", "stop = tl.maximum(tl.minimum(high + ahead,"),
    ],
    ("_softcap.py", "test_flash_attention.py"): [
        ("x * (1 + y * (-1 / 3", "x * (1 + y * (1 / 3"),
    ],
    ("_flash_backward.py", "test_flash_attention.py"): [
        ("ds = (slope * (dp - delta))", "ds = (slope * dp)"),
        ("slope = p * (1 - ratio * ratio)", "slope = p * (1 - ratio)"),
        ("(dk * scale).to(", "dk.to("),
        ("(dq * scale).to(", "dq.to("),
    ],
    ("flash_attention.py", "test_flash_attention.py"): [
        ("torch.mul(sums, scale, out=dq)", "dq.copy_(sums)"),
    ],
}  # fmt: skip

QUICK_FILES = ("cross_entropy.py", "decode_attention.py", "rms_norm.py", "rope.py", "swiglu.py")  # one of each
MUTATIONS = [Mutation(file, old, new, tests) for (file, tests), pairs in CHANGES.items() for old, new in pairs]
QUICK = [next(mutation for mutation in MUTATIONS if mutation.file == file) for file in QUICK_FILES]
SAMPLE = random.Random(0).sample(MUTATIONS, 40)


def mutated(mutation: Mutation) -> str:
    """The file's text after the change. Raises ValueError unless `old` occurs exactly once."""
    text = (ROOT / "kernels" / mutation.file).read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"kernels/{mutation.file} holds {mutation.old!r} {text.count(mutation.old)} times, not once")
    return text.replace(mutation.old, mutation.new)


def status_of(mutation: Mutation) -> int:
    """pytest's exit status for the changed copy, up to the first failure: 1 says that a test noticed the change.

    In a fork, so that importing PyTorch is paid for once. This process must not have imported kernels itself.
    """
    text = mutated(mutation)
    with tempfile.TemporaryDirectory() as folder:
        for part in ("kernels", "tests/kernels"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        Path(folder, "kernels", mutation.file).write_text(text, encoding="utf-8")
        child = os.fork()
        if child == 0:
            os._exit(_test_copy(folder, mutation.tests))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _test_copy(folder: str, tests: str) -> int:
    import pytest

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    os.chdir(folder)
    sys.path[:] = [folder, *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("kernels", "tests")]:
        del sys.modules[name]
    import kernels

    if not kernels.__file__.startswith(folder):
        return 99  # the tests would run on the unchanged kernels
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not prove and not gpu"]
    return int(pytest.main([*options, f"tests/kernels/{tests}"]))


def main(arguments: list[str]) -> int:
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, here for all forks
    os.environ["OMP_NUM_THREADS"] = "1"
    import pytest  # noqa: F401
    import torch  # noqa: F401
    import triton  # noqa: F401

    parts = {"--quick": QUICK, "--sample": SAMPLE}
    chosen = parts.get(" ".join(arguments), [m for m in MUTATIONS if not arguments or m.file in arguments])
    survivors = 0
    for mutation in chosen:
        status = status_of(mutation)
        survivors += status != 1
        print(f"{'noticed' if status == 1 else f'SURVIVED ({status})':<13} {mutation.file}: {mutation.new}", flush=True)
    print(f"{len(chosen)} tried, {survivors} survived")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
