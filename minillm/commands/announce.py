"""What a person reads before the first step: the plan, and what there is to beat."""

from typing import Any

import torch

from minillm import ops, preflight
from minillm.config import Settings
from minillm.training.plan import Plan
from minillm.training.verdict import BASELINES


def predictions(settings: Settings, plan: Plan) -> dict[str, Any]:
    """What config.json keeps beside the plan, to be held against what came out."""
    memory = preflight.memory(settings, plan.micro_batch, device=torch.device(plan.device), dtype=plan.dtype)
    return {
        "parameters": sum(preflight.parameters(settings.model).values()),
        "tokens_per_step": settings.train.batch * settings.model.context,
        "predicted_seconds": plan.seconds,
        "predicted_bytes": memory.total,
    }


def plan_text(settings: Settings, plan: Plan, predicted: dict[str, Any], corpus: dict[str, Any]) -> str:
    """Device, size, memory, time, text, kernels."""
    model, tokens = settings.model, predicted["tokens_per_step"]
    side, why = ops.selected(torch.device(plan.device))
    flops = preflight.flops_per_token(model) * tokens * plan.steps
    threads = f", {plan.threads} threads" if plan.device == "cpu" else ""
    compiled = ", compiled" if plan.compile else ""
    lines = {
        "model": f"{model.shape}, {predicted['parameters']:,} parameters: {model.layers} layers, {model.dim} wide, "
        f"{model.heads} heads, context {model.context}, vocabulary {model.vocab_size}",
        "device": f"{plan.device}{threads}, {plan.dtype}{compiled}",
        "kernels": f"{side} for attention, norms, RoPE, MLP gate and loss ({why})",
        "memory": f"{predicted['predicted_bytes'] / 2**20:,.0f} MiB predicted, with {plan.micro_batch} of "
        f"{settings.train.batch} sequences at a time",
        "text": f"{corpus['train_bytes']:,} bytes = {corpus['train_tokens']:,} tokens to train on, "
        f"{corpus['val_bytes']:,} bytes held out {corpus['split']}",
        "steps": f"{plan.steps:,} of {tokens:,} tokens = {plan.steps * tokens / corpus['train_tokens']:.2f} epochs, "
        f"{flops:.2e} FLOP",
        "time": f"{plan.seconds / 60:.1f} min predicted, at {tokens / plan.seconds_per_step:,.0f} tokens/s",
    }
    return "\n".join(["plan", *(f"  {name:<9}{text}" for name, text in lines.items())])


def baselines_text(values: dict[str, Any]) -> str:
    """One line: what the validation text costs in bits per byte without any learning, or with little."""
    known = [f"{words} {values[name]:.3f}" for name, words in BASELINES.items() if values.get(name) is not None]
    return f"to beat  {', '.join(known)} (bits per byte of the held-out text)\n" if known else ""
