"""Whether a step may move the weights.

    fault     the loss is not finite, or the norm ‖g‖ of the whole gradient is not, or it is a spike
    spike     ‖g‖ > μ + max(6 σ, μ), μ and σ over the norms of the last 128 steps that were taken (from 64 on)

A fault ends the run; with `train.skip_spikes` so many in a row are passed over, and a spike counts as a fault. Six
standard deviations of 128 steps is the rule of OLMo-core's skip-step optimizer; twice the mean is asked for as well,
since the norms of a steady run lie so close together that six deviations are no harm. As in llm.c's detector, a step
that is passed over is no measure for those after it: one spike would hide the next.
"""

import math
import statistics

import torch

from minillm.data.batch import Batch
from minillm.training.job import Job, Progress, TrainingFailed
from minillm.training.monitor import Monitor
from minillm.training.plan import autocast

WINDOW, FEWEST = 128, 64
DEVIATIONS, TIMES = 6.0, 2.0


def highest_usual(norms: list[float]) -> float:
    """The norm above which the next one is a spike; infinite while there are too few to tell."""
    if len(norms) < FEWEST:
        return math.inf
    mean = statistics.fmean(norms)
    return max(mean + DEVIATIONS * statistics.pstdev(norms, mean), TIMES * mean)


class Guard:
    def __init__(self, job: Job, monitor: Monitor, progress: Progress, scaler: torch.amp.GradScaler):
        self.job, self.monitor, self.progress, self.scaler = job, monitor, progress, scaler
        self.spikes = job.settings.train.skip_spikes is not None
        # A range test ends, as it should, after the step that is no longer finite.
        self.allowed = 1 if job.settings.optim.schedule == "range" else job.settings.train.skip_spikes or 0

    def lets_through(self, loss: float, norm: float, batch: Batch) -> bool:
        """Whether the step may be taken, which all ranks answer alike; what is passed over is said and recorded.

        Args:
            loss: mean over the targets of all ranks.
            norm: of the gradient of all ranks, as it would move the weights but for clipping.
            batch: this rank's rows.

        Raises:
            TrainingFailed: it may neither be taken nor passed over.
        """
        progress = self.progress
        fault = self._fault(loss, norm)
        if fault is not None:
            if progress.skipped >= self.allowed:
                self._fail(fault, norm, batch)
            self._skip(fault, loss, norm)
            return False
        progress.skipped = 0
        if self.spikes and math.isfinite(norm):
            progress.norms = [*progress.norms, norm][-WINDOW:]
        return True

    def _fault(self, loss: float, norm: float) -> str | None:
        if not math.isfinite(loss):
            return "loss"
        if not math.isfinite(norm):
            # A scaler meets infinite fp16 gradients as a matter of course: it skips the step and halves its scale.
            # Where that does not help any more, they are infinite by themselves.
            return None if self.scaler.is_enabled() and self.scaler.get_scale() >= 1 else "gradient"
        if not self.spikes:
            return None
        # Norms may differ in their last bit between machines, and a rank that stepped alone would have other weights.
        spike = torch.tensor(norm > highest_usual(self.progress.norms))
        return "spike" if self.job.team.any(spike).item() else None

    def _skip(self, fault: str, loss: float, norm: float) -> None:
        self.progress.skipped += 1
        self.scaler.update(self.scaler.get_scale())  # it remembers gradients as unscaled until then
        step, usual = self.progress.step + 1, self._usual()
        self.monitor.event("skipped", step=step, what=fault, loss=loss, grad_norm=norm, usual=usual)
        self.monitor.say(
            f"step {step} is passed over: {_words(fault, norm, usual)} "
            f"({self.progress.skipped} in a row, of at most {self.allowed})"
        )

    def _fail(self, fault: str, norm: float, batch: Batch) -> None:
        job, step, usual = self.job, self.progress.step + 1, self._usual()
        where, found = "", {"grad_norm": norm, "usual": usual}
        if fault != "spike":
            with autocast(job.plan.device, job.plan.dtype)():
                layer, samples = job.team.locate(job.model, batch, job.objective)
            shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
            where, found = f", first at {layer}, samples {shown}", {"layer": layer, "samples": samples}
        after = f", after {self.progress.skipped} steps in a row were passed over" if self.progress.skipped else ""
        name = "spikes" if fault == "spike" else "nonfinite"
        self.monitor.event(name, step=step, what=fault, skipped=self.progress.skipped, **found)
        raise TrainingFailed(
            f"step {step}: {_words(fault, norm, usual)}{where}{after}; the weights are unchanged. "
            f"Lower --optim.lr, or look closer with: minillm doctor {job.run}"
        )

    def _usual(self) -> float | None:
        return statistics.fmean(self.progress.norms) if self.progress.norms else None


def _words(fault: str, norm: float, usual: float | None) -> str:
    if fault == "spike":
        return f"the gradient's norm is {norm:.3g}, where {usual:.3g} is usual"
    return f"the {fault} is not finite"
