"""The one loop: everything that trains goes through `train`.

A step is forward, backward (for each micro-batch), clip, step. Between steps come the chores: validation, a sample,
a checkpoint. What the loop knows besides weights and optimizer stands in `Progress`, and all of it is saved, so that
a run that is killed and resumed writes the same numbers as one that was not.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.data.batch import Batch
from minillm.training import checkpoint, lr_range, memory, snapshot
from minillm.training.guard import Guard
from minillm.training.job import Job, Outcome, Progress
from minillm.training.monitor import Monitor
from minillm.training.objectives import Evaluation, evaluate
from minillm.training.optim import add_penalties, gradient_norm, set_learning_rate
from minillm.training.plan import autocast
from minillm.training.run import cut_metrics
from minillm.training.signals import Signals, Stopped
from minillm.training.units import gradient_norms, watch_units


class Loop:
    def __init__(self, job: Job, monitor: Monitor, signals: Signals, progress: Progress, scaler: torch.amp.GradScaler):
        self.job, self.monitor, self.signals, self.progress, self.scaler = job, monitor, signals, progress, scaler
        # By name from here on: fully_shard puts others in their place while it has them gathered.
        self.weights = {name: p for name, p in job.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.weights.values())
        self.precision, self.team = autocast(job.plan.device, job.plan.dtype), job.team
        self.guard = Guard(job, monitor, progress, scaler)
        self.ranging = job.settings.optim.schedule == "range"
        # One that was saved before its validation ended is saved again after it, with what the validation found.
        self.saved: int | None = progress.step if progress.step and progress.chores_done else None
        self.random = snapshot.random_state()  # after the last finished step

    def run(self) -> Outcome:
        job, progress, plan = self.job, self.progress, self.job.plan
        patience = None if self.ranging else job.settings.train.patience
        job.model.train()
        try:
            while True:
                self._chores()
                if self._is_over() or (patience is not None and progress.worse >= patience):
                    break
                if job.profile is None:
                    self._step()
                else:
                    progress.line_seconds += job.profile.watch(self._step)
                # Step 1 begins with untrained weights: its loss says what a first validation would have said.
                untrained = progress.step == 1 and not plan.eval_first
                if untrained or progress.step % plan.log_every == 0 or progress.step == plan.steps:
                    self._log()
                self.monitor.advance()
        except Stopped as stopped:
            self._save_last_step()
            self._end("signal")
            return Outcome("signal", stopped.code, progress)
        except memory.OneRowTooMany:
            self._save_last_step()
            raise
        reason = "finished" if self._is_over() else "early stop"
        if job.settings.train.patience is not None and progress.best_step not in (None, progress.step):
            self._restore_best()
        self._end(reason)
        return Outcome(reason, 0, progress)

    def _is_over(self) -> bool:
        """Whether there is no step left; of a range test, whether a higher rate has nothing to tell."""
        progress = self.progress
        ruined = self.ranging and (progress.skipped > 0 or lr_range.is_over(progress.curve))
        return ruined or progress.step >= self.job.plan.steps

    def _step(self) -> None:
        """One optimizer step; where memory runs out before a weight has moved, again with smaller micro-batches."""
        job, step = self.job, self.progress.step + 1
        self.lr = set_learning_rate(job.optimizers, self.progress.step, job.plan.steps, job.settings.optim)
        while (found := memory.attempt(self._backward)) is None:
            snapshot.set_random_state(self.random)
            memory.shrink(job, self.monitor, step)
        with memory.no_way_back(job, step):
            self._update(*found)

    def _backward(self) -> tuple[Batch, int, Tensor]:
        """Forward and backward for each micro-batch; returns this rank's rows, all ranks' targets, its rows' loss."""
        job = self.job
        batch = job.batch(self.progress.step).to(torch.device(job.plan.device))
        counted = self.team.total(job.count(batch))
        for optimizer in job.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=batch.ids.device)
        # Each part weighs by its tokens: the sum over micro-batches is the mean over the whole batch. A team takes the
        # mean over its ranks, where the sum is wanted.
        share = max(1, counted) / self.team.size
        micros = list(batch.split(job.plan.micro_batch))
        for micro in micros:
            with self.precision():
                loss = job.call(job.objective, job.model, micro, last=micro is micros[-1])
            self.scaler.scale(loss / share).backward()
            total += loss.detach()
            self.team.poll(self.signals, midway=True)
        return batch, counted, total

    def _update(self, batch: Batch, counted: int, total: Tensor) -> None:
        """Penalties, clip, step; nothing moves where the guard does not let the step through, or raises.

        Args:
            counted: targets of all ranks.
            total: loss of this rank's rows, summed over their targets.
        """
        job, progress = self.job, self.progress
        for optimizer in job.optimizers:
            self.scaler.unscale_(optimizer)
        add_penalties(job.model, job.settings.optim)
        if job.allocator is not None:
            job.allocator.regularise()
        norm = gradient_norm(self.parameters)
        self.norm = norm.item()
        mean = self.team.total(total.item()) / max(1, counted)
        if self.guard.lets_through(mean, self.norm, batch):
            self._move(norm)
        else:
            mean, counted = 0.0, 0  # the log speaks of the steps that were taken
        progress.advance(tokens=self.team.size * batch.ids.numel(), loss_sum=mean * counted, targets=counted)
        self.random = snapshot.random_state()

    def _move(self, norm: Tensor) -> None:
        """Moves the weights, and AdaLoRA's ranks, by the gradient, whose norm is `norm`."""
        job = self.job
        if job.allocator is not None and norm.isfinite():  # the scaler's own skip leaves nothing to measure
            job.allocator.measure()
        if job.settings.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, job.settings.optim.clip, norm)
        for optimizer in job.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        if job.allocator is not None:
            job.allocator.after_step(self.progress.step + 1)

    def _log(self) -> None:
        progress, seconds = self.progress, self.monitor.seconds
        if progress.skipped and not progress.targets:
            return  # none of these steps was taken: there is no loss to speak of
        loss = progress.loss_sum / max(1, progress.targets)
        self.monitor.line(
            "train",
            step=progress.step,
            tokens=progress.tokens,
            loss=loss,
            bits_per_byte=_times(loss, self.job.train_bits),
            lr=self.lr,
            grad_norm=self.norm,
            tokens_per_second=progress.line_tokens / max(1e-9, seconds - progress.line_seconds),
            targets=progress.targets,
            epoch=progress.step * self.job.settings.train.batch / self.job.samples_per_epoch,
        )
        if self.ranging:
            progress.curve.append(loss)
        progress.begin_line(seconds)

    def _chores(self) -> None:
        """What is due after `progress.step` steps: validation, samples, a checkpoint."""
        job, progress, plan = self.job, self.progress, self.job.plan
        last = self._is_over()
        self.team.poll(self.signals)
        if not progress.chores_done:
            before = self.monitor.seconds
            if last or (progress.step % plan.eval_every == 0 and (plan.eval_first or progress.step > 0)):
                self._validate()
            if job.sample is not None and progress.step in plan.sample_steps:
                self._sample(job.sample)
            progress.line_seconds += self.monitor.seconds - before  # the log's tokens/s is that of training alone
            progress.chores_done = True
        wanted = self.signals.save or last or (progress.step > 0 and progress.step % plan.save_every == 0)
        improved = job.settings.train.patience is not None and progress.best_step == progress.step
        if improved or (wanted and progress.step > 0):  # a finished model may be the best before its first step
            self._save()
        self.team.poll(self.signals)

    def _validate(self) -> None:
        job, progress = self.job, self.progress
        with watch_units(job.model) as alive:
            result: Evaluation = evaluate(
                job.model, job.validation(), self.precision, partial(self.team.poll, self.signals),
                partial(job.call, job.score), job.count, self.team.total,
            )  # fmt: skip
            metrics = {} if job.metrics is None else job.metrics(job.model)
        if progress.step > 0:
            active = {name: self.team.any(units).float().mean().item() for name, units in alive.items()}
            ranks = {} if job.allocator is None else {"ranks": job.allocator.ranks()}
            norms = gradient_norms(self.weights)
            self.monitor.event("layers", step=progress.step, grad_norms=norms, active=active, **ranks)
        self.monitor.line(
            "val",
            [job.watch] if job.watch is not None else [*metrics],
            step=progress.step,
            tokens=progress.tokens,
            loss=result.loss,
            bits_per_byte=_times(result.loss, job.val_bits),
            targets=result.targets,
            **metrics,
        )
        progress.judge(result.loss if job.watch is None else -metrics[job.watch], result.loss)

    def _sample(self, sample: Callable[[nn.Module, int], Iterable[dict[str, Any]]]) -> None:
        step, model = self.progress.step, self.team.whole_model(self.job.model)
        if model is None:
            return
        with self.team.busy("sampling"):
            for event in sample(model, step):
                self.monitor.sample(step, event)

    def _save(self) -> None:
        job, progress = self.job, self.progress
        self.signals.save = False
        if self.saved == progress.step:
            return
        progress.seconds = self.monitor.seconds
        self.team.save(
            job.run,
            progress.step,
            weights=job.model.state_dict(),
            state=snapshot.take(job, progress, self.scaler),
            config=job.config,
            tokenizer=job.run / "tokenizer",
            keep=job.settings.train.keep,
            best=progress.best_step,
        )
        self.saved = progress.step

    def _save_last_step(self) -> None:
        """Saves the last finished step: the random state goes back to where the unfinished one began."""
        if not self.progress.step:
            return
        snapshot.set_random_state(self.random)
        self._save()
        self.team.settle()
        self.monitor.say(f"saved step {self.progress.step}; go on with: python train.py --resume {self.job.run}")

    def _restore_best(self) -> None:
        """Puts the best weights back, as the last checkpoint of the run."""
        progress = self.progress
        self.team.settle()
        best = self.job.run / "checkpoints" / f"step-{progress.best_step}"
        snapshot.put_back_weights(self.job.model, checkpoint.resolve(best))
        self.monitor.say(f"restored the best weights, those of step {progress.best_step}")
        self.saved = None
        self._save()

    def _end(self, reason: str) -> None:
        progress = self.progress
        best = {"best_step": progress.best_step, "best_loss": progress.best_loss}
        self.monitor.event("end", step=progress.step, seconds=self.monitor.seconds, reason=reason, **best)


def train(job: Job, signals: Signals, *, log: tuple[str, ...] = (), resume_from: Path | None = None) -> Outcome:
    """Trains to the end of the plan, from the start or from a checkpoint folder.

    Raises `TrainingFailed` for NaN or Inf, `UserError` where the checkpoint does not fit the job.
    """
    progress, scaler = Progress(), torch.amp.GradScaler(job.plan.device, enabled=job.plan.dtype == "fp16")
    if resume_from is not None:
        progress = snapshot.put_back(job, scaler, resume_from)
    if job.team.lead:
        cut_metrics(job.run, progress.step, chores_done=progress.chores_done)
    monitor = Monitor(
        job.run, job.plan.steps, log=log, seconds=progress.seconds, step=progress.step, writes=job.team.lead
    )
    try:
        with job.team.training(job.settings.train):  # until all are here, a stop is one before training
            signals.careful = True
            return Loop(job, monitor, signals, progress, scaler).run()
    finally:
        signals.careful = False
        monitor.close()


def _times(loss: float, bits: float | None) -> float | None:
    return None if bits is None else loss * bits
