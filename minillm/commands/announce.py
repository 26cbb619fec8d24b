"""What a person reads before the first step: the plan, and what there is to beat."""

from typing import Any

import torch

from minillm import ops, preflight
from minillm.config import Settings
from minillm.training.plan import Plan
from minillm.training.verdict import BASELINES


def plan_text(settings: Settings, plan: Plan, corpus: dict[str, Any]) -> str:
    """Device, size, memory, time, text, kernels."""
    device, model = torch.device(plan.device), settings.model
    count = sum(preflight.parameters(model).values())
    bytes_needed = preflight.memory(settings, plan.micro_batch, device=device, dtype=plan.dtype).total
    rows, tokens = settings.train.batch, settings.train.batch * model.context
    side, why = ops.selected(device)
    time = "not measured (a number of steps was given)"
    if plan.seconds_per_step is not None:
        speed = tokens / plan.seconds_per_step
        time = (
            f"{plan.steps * plan.seconds_per_step / 60:.1f} min of steps at {speed:,.0f} tokens/s, and the validations"
        )
    flops = preflight.flops_per_token(model)
    threads = f", {plan.threads} threads" if plan.device == "cpu" else ""
    compiled = ", compiled" if plan.compile else ""
    lines = {
        "model": f"{model.shape}, {count:,} parameters: {model.layers} layers, {model.dim} wide, {model.heads} heads, "
        f"context {model.context}, vocabulary {model.vocab_size}",
        "device": f"{plan.device}{threads}, {plan.dtype}{compiled}",
        "kernels": f"{side} for attention, norms, RoPE, MLP gate and loss ({why})",
        "memory": f"{bytes_needed / 2**20:,.0f} MiB predicted, with {plan.micro_batch} of {rows} sequences at a time",
        "text": f"{corpus['train_bytes']:,} bytes = {corpus['train_tokens']:,} tokens to train on, "
        f"{corpus['val_bytes']:,} bytes held out {corpus['split']}",
        "steps": f"{plan.steps:,} of {tokens:,} tokens = {plan.steps * tokens / corpus['train_tokens']:.2f} epochs, "
        f"{flops * tokens * plan.steps:.2e} FLOP",
        "time": time,
    }
    return "\n".join(["plan", *(f"  {name:<9}{text}" for name, text in lines.items())])


def baselines_text(values: dict[str, Any]) -> str:
    """One line: what the validation text costs in bits per byte without any learning, or with little."""
    known = [f"{words} {values[name]:.3f}" for name, words in BASELINES.items() if values.get(name) is not None]
    return f"to beat  {', '.join(known)} (bits per byte of the held-out text)\n" if known else ""
