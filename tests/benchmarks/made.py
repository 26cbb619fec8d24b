"""What the tests of benchmarks share: what every row carries, and what stands for minillm's processes."""

import json
from pathlib import Path

ABOUT = {
    "device": "NVIDIA H200", "versions": {"torch": "2.13.0"}, "commit": "abc", "sources": "s1", "load": 0.5,
    "date": "2026-01-02T03:04:05+00:00", "quick": False,
}  # fmt: skip
SIZES = {"trained_parameters": 10, "parameters": 40, "adapter_bytes": 2048, "peak_bytes": 3 << 20}
AGAINST = {"metric": "rouge_l", "value": 0.5, "trivial": 0.25, "what": "the source itself", "beaten": True}


class Commands:
    """What minillm was asked, in order; each training leaves a finished run, whose scores depend on its seed."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.failing: tuple[str, ...] = ()
        """How the names of finetunings begin that end with an error."""

    def finish(self, argv: list[str], run: Path) -> int:
        self.asked.append(["finetune", *argv, "--out", str(run)])
        if run.name.startswith(self.failing):
            return 1
        assert not run.exists(), "nothing is run twice"
        leave(run)
        return 0

    def minillm(self, *argv: str) -> str:
        self.asked.append([*argv])
        if argv[0] == "evaluate":
            seed = int(argv[1].split("-")[-2])
            return json.dumps({"loss": 0.5, "accuracy": 0.5 + seed / 100, "macro_f1": 0.4, "examples": 4})
        leave(Path(argv[-1]))
        return ""


def leave(run: Path) -> None:
    """The files of a run that benchmarks read."""
    run.mkdir(parents=True, exist_ok=True)
    metrics = {"accuracy": 0.25, "macro_f1": 0.2, "confusion": [[1]]}
    metrics |= {"loss": 1.5, "old_loss_before": 3.0, "old_loss_after": 3.25}
    result = {"metrics": metrics, "steps": 4, "best_step": 3, "cpu_seconds": 9.0, "against": AGAINST, **SIZES}
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.json").write_text(json.dumps({"corpus": {"documents": 12}, "plan": {"threads": 2}}))
    lines = [{"event": "baselines"}, {"split": "val", "loss": 2.5}, {"split": "val", "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
