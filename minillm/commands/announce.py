"""What a person reads before the first step: the plan, and what there is to beat."""

from typing import Any

import torch

from minillm import cpu, ops, preflight
from minillm.config import ModelConfig, Settings
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


def plan_text(
    settings: Settings, plan: Plan, predicted: dict[str, Any], corpus: dict[str, Any], processes: int = 1
) -> str:
    """Device, size, memory, time, text, kernels."""
    model, tokens = settings.model, predicted["tokens_per_step"]
    flops = preflight.flops_per_token(model) * tokens * plan.steps
    threads = f", {plan.threads} threads" if plan.device == "cpu" else ""
    compiled = ", compiled" if plan.compile else ""
    together = f", {processes} processes together ({settings.train.parallel})" if processes > 1 else ""
    guess = "as an estimate" if plan.device == "cpu" else "predicted"  # on a CPU the heap's share is a guess
    lines = {
        "model": f"{model.shape}, {predicted['parameters']:,} parameters: {model.layers} layers, {model.dim} wide, "
        f"{model.heads} heads, context {model.context}, vocabulary {model.vocab_size}",
        "device": f"{plan.device}{threads}, {plan.dtype}{compiled}{together}",
        "kernels": operators_text(model, torch.device(plan.device), plan.dtype),
        "memory": f"{predicted['predicted_bytes'] / 2**20:,.0f} MiB {guess}, with {plan.micro_batch} of "
        f"{settings.train.batch} sequences at a time",
        "text": f"{corpus['train_bytes']:,} bytes = {corpus['train_tokens']:,} tokens to train on, "
        f"{corpus['val_bytes']:,} bytes held out {corpus['split']}",
        "steps": f"{plan.steps:,} of {tokens:,} tokens = {plan.steps * tokens / corpus['train_tokens']:.2f} epochs, "
        f"{flops:.2e} FLOP",
        "time": f"{plan.seconds / 60:.1f} min predicted, at {tokens / plan.seconds_per_step:,.0f} tokens/s",
    }
    return "\n".join(["plan", *(f"  {name:<9}{text}" for name, text in lines.items())])


def operators(model: ModelConfig, device: torch.device, dtype: str) -> dict[str, str]:
    """What of a training step runs on which operator, and where it is not the usual one of its side, why."""
    triton = ops.selected(device)[0] == "triton"
    attention, norm, position = model.attention, model.norm, model.position
    named = {"attention": "flash_attention"} if triton else {"attention": "F.scaled_dot_product_attention"}
    if not triton and attention.softcap is not None:
        named["attention"] = "flash_attention_reference (F.scaled_dot_product_attention has no softcap)"
    elif device.type == "cpu" and dtype == "bf16" and not triton and model.context**2 <= cpu.PLAIN_ATTENTION:
        named["attention"] = (
            "two products and a softmax (F.scaled_dot_product_attention does not use bf16 instructions)"
        )
    elif not triton and (attention.window is not None or position.kind == "alibi"):
        named["attention"] += " with a mask in memory (it has no window and no ALiBi)"
    if triton:
        named["norm"] = f"{norm.kind}_norm, the residual's addition in the same pass"
    else:
        named["norm"] = f"F.{norm.kind}_norm after the residual's addition"
    if position.kind == "rope":
        named["RoPE"] = "rope" if triton else "elementwise operators"
    if attention.qk_norm:
        apart = "rms_norm of q and of k" if triton else "F.rms_norm of q and of k"
        named["QK-norm"] = "in RoPE's pass" if triton and position.kind == "rope" else apart
    if model.mlp.gated:
        named["MLP"] = model.mlp.kind if triton else f"F.{'silu' if model.mlp.kind == 'swiglu' else 'gelu'}(gate) · up"
    else:
        named["MLP"] = f"{model.mlp.kind} of PyTorch (no gate, so nothing to fuse)"
    if triton:
        named["loss"] = "linear_cross_entropy, never all logits"
    elif device.type == "cpu":
        named["loss"] = "linear cross-entropy in chunks that fit the cache, never all logits"
    else:
        named["loss"] = "F.cross_entropy of all logits"
    return named


def operators_text(model: ModelConfig, device: torch.device, dtype: str) -> str:
    """The side that was chosen and why; below it, a line for each operator."""
    side, why = ops.selected(device)
    lines = (f"{'':13}{part:<11}{runs}" for part, runs in operators(model, device, dtype).items())
    return "\n".join([f"{side} ({why})", *lines])


def baselines_text(values: dict[str, Any]) -> str:
    """One line: what the validation text costs in bits per byte without any learning, or with little."""
    known = [f"{words} {values[name]:.3f}" for name, words in BASELINES.items() if values.get(name) is not None]
    return f"to beat  {', '.join(known)} (bits per byte of the held-out text)\n" if known else ""
