"""Models of other projects with the same weights as ours, each trained the way in which its own project trains it.

A trainer takes a step on a batch and returns the loss. Ours is the loop's own step, with everything that it checks.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minillm.config import ModelConfig, OptimConfig, Settings, from_dict
from minillm.data.batch import Batch
from minillm.interop.hf import build, read_hf
from minillm.model.transformer import Transformer
from minillm.training.job import Job, Progress
from minillm.training.loop import Loop
from minillm.training.objectives import training_objective
from minillm.training.optim import build_optimizers
from minillm.training.plan import Plan, autocast
from minillm.training.signals import Signals

Trainer = Callable[[Tensor, Tensor], float]
"""(ids [B, T], targets [B, T]) -> the mean loss before the step."""
OPTIM = OptimConfig(lr=1e-3, schedule="constant", warmup=0.0)
"""AdamW, for all alike; its betas, decay and clipping are the defaults."""


@dataclass(frozen=True)
class Setting:
    """What is equal for all."""

    settings: Settings
    device: torch.device
    dtype: str
    compile: bool

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.settings.train.batch * self.settings.model.context


def setting(model: dict[str, Any], batch: int, device: torch.device, dtype: str) -> Setting:
    values = {"steps": 10**6, "model": model, "train": {"batch": batch}}
    settings = from_dict(Settings, {**values, "optim": {"lr": 1e-3, "schedule": "constant", "warmup": 0.0}})
    return Setting(settings, device, dtype, compile=device.type == "cuda")


def start(of: Setting) -> nn.Module:
    """A model with random weights in the setting's shape, where all begin: Transformers', or ours where it has none."""
    if of.settings.model.speedrun.ngrams:
        torch.manual_seed(0)
        return Transformer(of.settings.model)
    model = random_model(of.settings.model)
    model.loss_type = "ForCausalLM"  # what it takes by itself, with a warning
    return model


def random_model(model: ModelConfig) -> Any:
    """GPT2LMHeadModel where positions are learned, else Qwen3ForCausalLM with QK-norm and LlamaForCausalLM without."""
    import transformers

    torch.manual_seed(0)
    common: dict[str, Any] = {"vocab_size": model.vocab_size, "bos_token_id": None, "eos_token_id": None}
    if model.position.kind == "learned":
        activation = {"gelu": "gelu", "gelu-tanh": "gelu_new"}[model.mlp.kind]
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=model.layers, n_head=model.heads, n_embd=model.dim, n_positions=model.context,
                activation_function=activation, layer_norm_epsilon=model.norm.eps,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common,
            )
        )  # fmt: skip
    family = "Qwen3" if model.attention.qk_norm else "Llama"
    config = getattr(transformers, f"{family}Config")(
        num_hidden_layers=model.layers, num_attention_heads=model.heads, hidden_size=model.dim,
        num_key_value_heads=model.key_value_heads, head_dim=model.head_width,
        intermediate_size=model.mlp_width, max_position_embeddings=model.context, rms_norm_eps=model.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.position.theta}, tie_word_embeddings=model.tied,
        attention_bias=False, **common,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config)


def same_weights(theirs: Any) -> Transformer:
    """A model of Transformers' as one of ours."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        theirs.save_pretrained(folder)
        model = build(read_hf(folder))
    assert isinstance(model, Transformer)
    return copy.deepcopy(model)  # the file's own memory goes with the folder


def minillm(of: Setting, first: nn.Module, *, on: Callable[[], contextlib.AbstractContextManager]) -> Trainer:
    """Ours, as `minillm train` makes steps; each within `on()`."""
    model = copy.deepcopy(first) if isinstance(first, Transformer) else same_weights(first)
    model = model.to(of.device).train()
    objective = training_objective(of.settings.train)
    batches: list[Batch] = []
    job = Job(
        model=model, optimizers=build_optimizers(model, of.settings.optim), settings=of.settings, plan=_plan(of),
        objective=torch.compile(objective) if of.compile else objective, batch=lambda step: batches.pop(),
        validation=list, run=Path(), config={}, train_bits=None, val_bits=None, samples_per_epoch=1,
    )  # fmt: skip
    loop = Loop(job, None, Signals(), Progress(), torch.amp.GradScaler(of.device.type, enabled=False))

    def step(ids: Tensor, targets: Tensor) -> float:
        batches.append(Batch(ids=ids, targets=targets, samples=tuple(range(len(ids)))))
        before = loop.progress.loss_sum
        with on():
            loop._step()
        return (loop.progress.loss_sum - before) / targets.numel()

    return step


def _plan(of: Setting) -> Plan:
    return Plan(
        device=of.device.type, dtype=of.dtype, kernels="auto", compile=of.compile, threads=torch.get_num_threads(),
        micro_batch=of.settings.train.batch, steps=10**6, eval_every=10**6, save_every=10**6, log_every=10**6,
        seconds_per_step=0.0, seconds_per_validation=0.0,
    )  # fmt: skip


def transformers(of: Setting, first: nn.Module) -> Trainer:
    """Transformers' own model, with SDPA, fused AdamW and its own loss."""
    model = copy.deepcopy(first).to(of.device).train()
    model.config.use_cache = False
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=OPTIM.lr, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps, fused=True)
    run = torch.compile(model) if of.compile else model
    # `shift_labels` are targets that stand at their own place already
    return _plain(of, model, optimizer, lambda ids, targets: run(ids, labels=targets, shift_labels=targets).loss)


def nanogpt(of: Setting, first: nn.Module, checkout: Path) -> Trainer:
    """An unmodified nanoGPT: its model, its optimizer, the step of its train.py. GPT-2-shaped settings only."""
    theirs, model = _import(checkout / "model.py"), of.settings.model
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        gpt = theirs.GPT(
            theirs.GPTConfig(
                block_size=model.context, vocab_size=model.vocab_size, n_layer=model.layers, n_head=model.heads,
                n_embd=model.dim, dropout=0.0, bias=True,
            )
        )  # fmt: skip
        gpt.load_state_dict(_nanogpt_weights(first.state_dict(), gpt.state_dict()))
        gpt = gpt.to(of.device).train()
        betas = (OPTIM.beta1, OPTIM.beta2)
        optimizer = gpt.configure_optimizers(OPTIM.weight_decay, OPTIM.lr, betas, of.device.type)
    run = torch.compile(gpt) if of.compile else gpt
    return _plain(of, gpt, optimizer, lambda ids, targets: run(ids, targets)[1])


def _plain(of: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[..., Tensor]) -> Trainer:
    """Forward, backward, clip, step, zero, as nanoGPT's train.py has it."""
    context = autocast(of.device.type, of.dtype)

    def step(ids: Tensor, targets: Tensor) -> float:
        with context():
            loss = loss_of(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _nanogpt_weights(theirs: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT2LMHeadModel's tensors by nanoGPT's names, which are the same; its matrices stand the other way round."""
    turned = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return {name: theirs[name].t() if name.endswith(turned) else theirs[name] for name in own}


def _import(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"--nanogpt {path.parent}: there is no model.py; give the folder of a nanoGPT checkout")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
