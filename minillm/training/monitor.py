"""What a person sees while a model trains: a progress bar on a terminal, plain lines elsewhere, trackers if asked."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minillm.config import UserError
from minillm.training.run import Metrics


class Monitor:
    """Writes every number to metrics.jsonl, and says the ones that matter on stderr.

    Args:
        log: trackers besides the file, any of "tb" (TensorBoard, into RUN/tensorboard) and "wandb".
        seconds: time that the run had already taken when it was resumed.
        writes: whether metrics.jsonl and trackers are this process's to write.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        *,
        log: tuple[str, ...] = (),
        seconds: float = 0.0,
        step: int = 0,
        writes: bool = True,
    ):
        self.metrics = Metrics(run) if writes else None
        self.steps, self.start = steps, time.monotonic() - seconds
        self.trackers = [TRACKERS[name](run) for name in log] if writes else []
        self.bar = tqdm(total=steps, initial=step, unit="step", file=sys.stderr) if sys.stderr.isatty() else None

    @property
    def seconds(self) -> float:
        """Since training began, pauses between resumed parts left out."""
        return time.monotonic() - self.start

    def say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def event(self, name: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(event=name, **values)

    def sample(self, step: int, event: dict[str, Any]) -> None:
        """What a model wrote after so many steps, and how much of such text parses where that is asked."""
        self.event("sample", step=step, **event)
        parses = f"{event['parses']:.0%} of {event['tried']} parse\n" if event["parses"] is not None else ""
        self.say(f"\n--- sample after {step} steps ---\n{event['prompt']}{event['text']}\n{parses}---\n")

    def line(self, split: str, shown: Iterable[str] = (), **values: Any) -> None:
        """One line of numbers: `split` is train or val; the values named in `shown` are said besides the loss."""
        head = {name: values.pop(name) for name in ("step", "tokens")}
        values = {**head, "seconds": self.seconds, "split": split, **values}
        if self.metrics is not None:
            self.metrics.write(**values)
        for tracker in self.trackers:
            tracker(split, values)
        bits = values.get("bits_per_byte")
        parts = [f"loss {values['loss']:.4f}"] + ([f"{bits:.3f} bits/byte"] if bits is not None else [])
        parts += [f"{name.replace('_', ' ')} {values[name]:.4f}" for name in shown if values[name] is not None]
        if split == "train":
            parts += [f"{values['tokens_per_second']:,.0f} tokens/s", f"lr {values['lr']:.2e}"]
            if self.bar is not None:
                self.bar.set_postfix_str(", ".join(parts[:-1]))
                return
            left = (self.steps - values["step"]) * values["tokens"] / values["step"] / values["tokens_per_second"]
            parts.append(f"{left / 60:.1f} min left")
        self.say(
            f"{'validation' if split == 'val' else 'step':>10} {values['step']:>6}/{self.steps}  {'  '.join(parts)}"
        )

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        if self.bar is not None:
            self.bar.close()


def _tensorboard(run: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError('--log tb needs TensorBoard: pip install "minillm[log]"') from error
    writer = SummaryWriter(str(run / "tensorboard"))

    def track(split: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(f"{split}/{name}", value, values["step"])
        writer.flush()

    return track


def _wandb(run: Path):
    try:
        import wandb
    except ImportError as error:
        raise UserError("--log wandb needs Weights & Biases: pip install wandb") from error
    session = wandb.init(project="minillm", name=run.name, dir=str(run))

    def track(split: str, values: dict[str, Any]) -> None:
        session.log({f"{split}/{name}": value for name, value in values.items()}, step=values["step"])

    return track


TRACKERS = {"tb": _tensorboard, "wandb": _wandb}
