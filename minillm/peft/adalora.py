"""AdaLoRA (Zhang et al. 2023, https://arxiv.org/abs/2303.10512): LoRA whose ranks go where they matter.

    y = W x + b + scale · P Λ (Q x)       P [out, R], Λ diagonal [R], Q [R, in]; scale = alpha / R
    loss + γ Σ (‖PᵀP − I‖² + ‖QQᵀ − I‖²)                                              eq. 4
    sensitivity  I = |w ∂loss/∂w|,  Ī = β₁ Ī + (1 − β₁) I                             eq. 8, 9
    uncertainty  Ū = β₂ Ū + (1 − β₂) |I − Ī|;  score s(w) = Ī Ū                       eq. 10, 11
    of triplet i:  S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)                     eq. 7

After each step Λ keeps the entries of the highest S over all layers, as many as the budget allows, and the others
become 0. The budget falls from layers · initial_rank to layers · rank with the cube of the time left (eq. 12). A
triplet that lost its Λ can come back until the budget has settled; from then on the choice is final.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.config import UserError
from minillm.peft.config import MethodConfig
from minillm.peft.linear import GrownLinear

BETA = 0.85
"""β₁ and β₂, of the paper's experiments."""


class SvdLinear(GrownLinear):
    """
    Args:
        linear: whose weight it takes over.
        rank: R, at the start; scale: alpha / R.
        dropout: on what Q reads.
    """

    own = ("lora_A", "lora_E", "lora_B", "kept")  # Q, Λ and P under the names that PEFT's files have

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__(linear)
        self.scale, self.dropout = scale, nn.Dropout(dropout)
        self.lora_A, self.lora_E, self.lora_B = (
            self.new(rank, linear.in_features),
            self.new(rank, 1),
            self.new(linear.out_features, rank),
        )
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=linear.weight.device))
        for matrix in (self.lora_A, self.lora_B):
            nn.init.normal_(matrix, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.dropout(x), self.lora_A * self.lora_E), self.lora_B)
        return super().forward(x) + self.scale * update

    @torch.no_grad()
    def delta(self) -> Tensor:
        return self.scale * (self.lora_B @ (self.lora_A * self.lora_E))


def budget(step: int, steps: int, start: int, target: int, config: MethodConfig) -> int:
    """Triplets that may stay after `step` of `steps` optimizer steps; falls from `start` to `target` (eq. 12)."""
    first, last = round(config.rank_warmup * steps), round((1 - config.rank_settle) * steps)
    left = 1 - (step - first) / max(1, last - first)
    return target + round((start - target) * min(1.0, max(0.0, left)) ** 3)


class Allocator:
    """Moves ranks between layers while they are trained.

        allocator.begin(steps)                      # once, before the first step
        … backward, unscale …
        allocator.regularise()                      # adds the regulariser's gradient
        allocator.measure()                         # measures importance; not for a step that is not taken
        optimizer.step()
        allocator.after_step(step)                  # step = how many optimizer steps are done, this one included

    `state()` and `load_state()` carry the moving averages through a checkpoint.
    """

    def __init__(self, layers: dict[str, SvdLinear], config: MethodConfig):
        self.layers, self.config = layers, config
        self.steps: int | None = None
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}

    def begin(self, steps: int) -> None:
        """Says how many optimizer steps there will be. Raises UserError where there is no time for ranks to fall."""
        first, last = round(self.config.rank_warmup * steps), round((1 - self.config.rank_settle) * steps)
        if last <= first or steps < 1:
            raise UserError(f"method=adalora: ranks cannot fall within {steps} steps; train for 5 or more")
        self.steps = steps

    def ranks(self) -> dict[str, int]:
        """Rank of each layer now, by the layer's name."""
        return {name: int(layer.kept.sum()) for name, layer in self.layers.items()}

    @torch.no_grad()
    def regularise(self) -> None:
        """With all gradients of the loss in place: adds that of the regulariser."""
        for layer in self._taking_part().values():
            P, Q = layer.lora_B, layer.lora_A
            P.grad += 4 * self.config.orthogonality * P @ _off_orthogonal(P.T)  # ∂‖PᵀP − I‖² = 4 P (PᵀP − I)
            Q.grad += 4 * self.config.orthogonality * _off_orthogonal(Q) @ Q

    @torch.no_grad()
    def measure(self) -> None:
        """Measures |w · gradient|."""
        for name, layer in self._taking_part().items():
            for own, weight in layer.named_parameters(recurse=False):
                if own in SvdLinear.own:
                    self._follow(f"{name}.{own}", (weight * weight.grad).abs())

    def _taking_part(self) -> dict[str, SvdLinear]:
        """The layers that this step gave a gradient."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if all(x.grad is not None for x in (layer.lora_A, layer.lora_E, layer.lora_B))
        }

    def _follow(self, name: str, now: Tensor) -> None:
        smooth = self.sensitivity.get(name, torch.zeros_like(now)).lerp(now, 1 - BETA)
        doubt = self.uncertainty.get(name, torch.zeros_like(now)).lerp((now - smooth).abs(), 1 - BETA)
        self.sensitivity[name], self.uncertainty[name] = smooth, doubt

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Keeps the most important triplets that the budget after `step` steps allows, and zeroes the others' Λ."""
        if self.steps is None:
            raise UserError("method=adalora: call begin(steps) before the first step, so that the budget is known")
        start, target = self.config.start_rank * len(self.layers), self.config.rank * len(self.layers)
        allowed = budget(step, self.steps, start, target, self.config)
        settled = step > round((1 - self.config.rank_settle) * self.steps)
        if allowed < start and not settled and self.sensitivity:
            self._choose(allowed)
        for layer in self.layers.values():
            layer.lora_E[~layer.kept] = 0.0

    def _choose(self, allowed: int) -> None:
        scores = torch.stack([self._score(name, layer) for name, layer in self.layers.items()])  # [layers, R]
        kept = torch.zeros_like(scores, dtype=torch.bool).flatten()
        kept[scores.flatten().argsort(descending=True, stable=True)[:allowed]] = True
        for layer, mine in zip(self.layers.values(), kept.view_as(scores), strict=True):
            layer.kept.copy_(mine)

    def _score(self, name: str, layer: SvdLinear) -> Tensor:
        """S [R] of a layer's triplets; 0 where none was measured."""
        if f"{name}.lora_E" not in self.sensitivity:
            return layer.lora_E.new_zeros(len(layer.kept))
        A, E, B = (self.sensitivity[f"{name}.{x}"] * self.uncertainty[f"{name}.{x}"] for x in SvdLinear.own[:3])
        return E.squeeze(1) + A.mean(1) + B.mean(0)

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "sensitivity": self.sensitivity, "uncertainty": self.uncertainty}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name in ("sensitivity", "uncertainty"):
            device = next(iter(self.layers.values())).weight.device
            setattr(self, name, {key: value.to(device) for key, value in state[name].items()})


def _off_orthogonal(rows: Tensor) -> Tensor:
    """M Mᵀ − I of a matrix M [R, N]"""
    return rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
