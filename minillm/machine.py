"""What this machine has, and what a run will use of it."""

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from minillm import ops, preflight
from minillm.config import Settings
from minillm.presets import settings
from minillm.training.plan import choose_device, choose_dtype, cores, cpu_multiplies_bf16

PACKAGES = ("torch", "triton", "numpy", "sentencepiece", "safetensors")
EXTRAS = {"data": "pyarrow", "log": "tensorboard", "plots": "matplotlib", "hf": "transformers"}
GIB = 2**30


def facts(folder: Path) -> dict[str, Any]:
    """Versions, devices, memory in bytes, compiler, Triton, disk free at `folder`, optional packages; plain values."""
    device = choose_device("auto")
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device.type,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "nvidia_driver": shutil.which("nvidia-smi") is not None,
        "cores": cores(),
        "memory_free": preflight.device_memory(device),
        "avx512": torch.cpu._is_avx512_supported() if platform.machine() in ("x86_64", "AMD64") else False,
        "bf16": torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_multiplies_bf16(),
        "dtype": choose_dtype(default_settings(), device),
        "kernels": list(ops.selected(device)),
        "triton": _triton(),
        "compiler": compiler(),
        "disk_free": shutil.disk_usage(folder).free,
        "extras": {extra: importlib.util.find_spec(package) is not None for extra, package in EXTRAS.items()},
    }


def advice(found: dict[str, Any]) -> list[str]:
    """What would make training on a machine with these facts work, or work better; one line each, most urgent first."""
    device, lines = torch.device(found["device"]), []
    default = default_settings()
    need = preflight.memory(default, default.train.batch, device=device, dtype=found["dtype"]).total
    if need > preflight.SPARE * found["memory_free"]:
        lines.append(
            f"the default run wants {need / GIB:.1f} GiB of memory at once and {found['memory_free'] / GIB:.1f} are "
            "free: it will take smaller micro-batches, which is slower but learns the same"
        )
    room = preflight.disk(default)
    if found["disk_free"] < 4 * room:
        lines.append(
            f"{found['disk_free'] / GIB:.1f} GiB of disk are free here, and the checkpoints of the default run take up "
            f"to {room / GIB:.1f}: make room, or point --out at another disk"
        )
    if not found["gpus"] and found["nvidia_driver"]:
        lines.append("there is an NVIDIA driver, but this PyTorch cannot use it: install PyTorch's CUDA build")
    if found["device"] == "cpu" and not (found["nvidia_driver"] or found["gpus"]):
        lines.append("no GPU: the default, mlm-tiny, seq2seq-tiny and shakespeare-char presets are made for a CPU")
    if found["device"] == "cuda" and found["packages"]["triton"] is None:
        lines.append("triton is not installed: training runs on PyTorch's operators; pip install triton")
    if not found["compiler"]["works"]:
        lines.append(f"torch.compile will fall back to eager: {found['compiler']['why']}")
    if missing := [extra for extra, there in found["extras"].items() if not there]:
        lines.append(f"optional: pip install -e '.[{','.join(missing)}]' adds what {', '.join(missing)} need")
    return lines


def default_settings() -> Settings:
    """The default preset, its model completed with the vocabulary that its tokenizer will have."""
    plain = settings("default")
    return settings("default", {"model": {"vocab_size": plain.tokenizer.vocab_size}})


def compiler() -> dict[str, Any]:
    """Whether code that torch.compile writes for a CPU can be built: a C++ compiler that finds Python.h.

    `works`, `command`, and `why` not. The compiler is CXX of the environment where that is set, as for torch.
    """
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    command = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if command is None:
        return {
            "works": False,
            "command": None,
            "why": "no C++ compiler was found; install g++ (Debian: apt install g++)",
        }
    include = sysconfig.get_paths()["include"]
    probe = [command, "-x", "c++", "-fsyntax-only", f"-I{include}", "-"]
    try:
        done = subprocess.run(
            probe, input="#include <Python.h>\n#include <cmath>\n", capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"works": False, "command": command, "why": f"{command} does not run: {error}"}
    if done.returncode == 0:
        return {"works": True, "command": command, "why": None}
    if not (Path(include) / "Python.h").exists():
        why = f"{include}/Python.h is missing; install Python's headers (Debian: apt install python3-dev)"
    else:
        why = f"{command} fails: {done.stderr.strip().splitlines()[0]}"
    return {"works": False, "command": command, "why": why}


def _triton() -> str:
    if _version("triton") is None:
        return "not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    return "gpu" if torch.cuda.is_available() else "idle: no GPU (TRITON_INTERPRET=1 interprets the kernels, slowly)"


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    return {"name": properties.name, "memory": properties.total_memory, "architecture": f"sm_{major}{minor}"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_bytes() -> int:
    """The most memory that this process has held: on a GPU of its memory, else resident."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return peak
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands ru_maxrss down from the process that started this one
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
