"""The whole forward pass written out: one row, one head, one query and one key at a time, in fp64.

It reads the weights from a state_dict and shares no code with minillm.model or minillm.ops, so that a mistake would
have to be made twice, in two different ways, to stay unseen. T tokens, S keys, D head width, N stream width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minillm.config import ModelConfig, PositionConfig

Table = Callable[[int], Tensor]


class Naive:
    """The logits of the model with this config and these weights.

    `angles` (position -> [D/2], each cos + i·sin) and `waves` (position -> [N]) replace the tables of RoPE and of the
    sinusoids: the model makes its own in fp32, which would hide everything below 1e-6.
    """

    def __init__(
        self, weights: dict[str, Tensor], config: ModelConfig, angles: Table | None = None, waves: Table | None = None
    ):
        self.weights = {name: weight.double() for name, weight in weights.items()}
        self.config = config
        self.angles, self.waves = angles or self._angles, waves or self._waves

    def logits(
        self,
        ids: Tensor,  # [B, T]
        *,
        segments: Tensor | None = None,
        source: Tensor | None = None,
        source_segments: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """[B, T, V]"""
        rows = []
        for b in range(len(ids)):
            documents = [0] * ids.shape[1] if segments is None else segments[b].tolist()
            x = self._embed(ids[b], None if token_types is None else token_types[b])
            if self.config.shape == "encoder":
                x = self._stack("encoder", x, documents, causal=False)
            elif self.config.shape == "decoder":
                x = self._stack("decoder", x, documents, causal=True)
            else:
                theirs = [0] * source.shape[1] if source_segments is None else source_segments[b].tolist()
                memory = self._stack(
                    "encoder",
                    self._embed(source[b], None, "source_embedding" if self.config.source_embedding else "embedding"),
                    theirs,
                    causal=False,
                )
                if source_segments is None:
                    theirs = None
                x = self._stack("decoder", x, documents, causal=True, memory=memory, memory_documents=theirs)
            rows.append(self._head(x))
        return torch.stack(rows)

    def _embed(self, ids: Tensor, token_types: Tensor | None, table: str = "embedding") -> Tensor:
        rows = []
        for t in range(len(ids)):
            x = self.weights[f"{table}.weight"][ids[t]]
            if self.config.embedding_scale:
                x = x * math.sqrt(self.config.dim)
            if self.config.token_types:
                x = x + self.weights["type_embedding.weight"][0 if token_types is None else token_types[t]]
            rows.append(x)
        return torch.stack(rows)

    def _stack(
        self,
        name: str,
        x: Tensor,  # [T, N]
        documents: list[int],
        *,
        causal: bool,
        memory: Tensor | None = None,
        memory_documents: list[int] | None = None,
    ) -> Tensor:
        places = _places(documents)
        if self.config.position.kind == "learned":
            x = x + torch.stack([self.weights[f"{name}.position.embedding.weight"][p] for p in places])
        if self.config.position.kind == "sinusoidal":
            x = x + torch.stack([self.waves(p) for p in places])
        if self.config.norm.embedding:
            x = self._norm(f"{name}.embedding_norm", x)
        layers = (self.config.decoder_layers if name == "decoder" else None) or self.config.layers
        pre = self.config.norm.placement == "pre"
        for layer in range(layers):
            block = f"{name}.blocks.{layer}"

            def attend(y: Tensor, block: str = block) -> Tensor:
                return self._attention(f"{block}.attention", y, y, documents, documents, causal, places)

            def read(y: Tensor, block: str = block) -> Tensor:
                return self._attention(f"{block}.cross_attention", y, memory, documents, memory_documents, False, None)

            halves = [("attention_norm", attend), ("mlp_norm", lambda y, block=block: self._mlp(f"{block}.mlp", y))]
            if memory is not None:
                halves.insert(1, ("cross_norm", read))
            for norm_name, half in halves:
                norm = f"{block}.{norm_name}"
                x = x + half(self._norm(norm, x)) if pre else self._norm(norm, x + half(x))
        return self._norm(f"{name}.final_norm", x) if pre else x

    def _attention(
        self,
        name: str,
        x: Tensor,  # [T, N]
        source: Tensor,  # [S, N]
        documents: list[int],
        source_documents: list[int] | None,
        causal: bool,
        places: list[int] | None,  # None: cross-attention, which knows no positions
    ) -> Tensor:
        config, D = self.config, self.config.head_width
        q, k = self._linear(f"{name}.q_proj", x), self._linear(f"{name}.k_proj", source)
        v = self._linear(f"{name}.v_proj", source)
        group = config.heads // config.key_value_heads
        outputs = []
        for t in range(len(x)):
            heads = []
            for h in range(config.heads):
                g = h // group
                query = self._prepare(f"{name}.q_norm", q[t, h * D : (h + 1) * D], places and places[t])
                scores, values = [], []
                for s in range(len(source)):
                    if not self._visible(t, s, documents, source_documents, causal, places is not None):
                        continue
                    key = self._prepare(f"{name}.k_norm", k[s, g * D : (g + 1) * D], places and places[s])
                    score = sum(query[i] * key[i] for i in range(D)) / math.sqrt(D)
                    if config.attention.softcap is not None:
                        score = config.attention.softcap * math.tanh(score / config.attention.softcap)
                    if config.position.kind == "alibi" and places is not None:
                        score = score - _slopes(config.heads)[h] * abs(t - s)
                    scores.append(float(score))
                    values.append(v[s, g * D : (g + 1) * D])
                mixed = torch.zeros(D, dtype=torch.float64)
                total = sum(math.exp(score) for score in scores)
                for score, value in zip(scores, values, strict=True):
                    mixed = mixed + math.exp(score) / total * value
                heads.append(mixed)
            outputs.append(torch.cat(heads))
        return self._linear(f"{name}.out_proj", torch.stack(outputs))

    def _visible(
        self, t: int, s: int, documents: list[int], source_documents: list[int] | None, causal: bool, to_self: bool
    ) -> bool:
        if source_documents is not None and documents[t] != source_documents[s]:
            return False
        if causal and s > t:
            return False
        window = self.config.attention.window if to_self else None
        return window is None or abs(t - s) < window

    def _prepare(self, norm: str, head: Tensor, place: int | None) -> list[float]:
        """A query or key [D]: normed, then rotated where it has a place."""
        if self.config.attention.qk_norm:
            head = head / torch.sqrt((head * head).sum() / len(head) + self.config.norm.eps)
            head = head * self.weights[f"{norm}.weight"]
        if self.config.position.kind == "rope" and place is not None:
            half = len(head) // 2
            turned = torch.complex(head[:half], head[half:]) * self.angles(place)
            head = torch.cat((turned.real, turned.imag))
        return head.tolist()

    def _mlp(self, name: str, x: Tensor) -> Tensor:
        kind = self.config.mlp.kind
        up = self._linear(f"{name}.up_proj", x)
        if kind in ("swiglu", "geglu"):
            gate = self._linear(f"{name}.gate_proj", x)
            return self._linear(f"{name}.down_proj", _activate("silu" if kind == "swiglu" else "gelu", gate) * up)
        return self._linear(f"{name}.down_proj", _activate(kind, up))

    def _head(self, x: Tensor) -> Tensor:
        if self.config.output_transform:
            x = self._norm("head.norm", _activate(self.config.mlp.kind, self._linear("head.dense", x)))
        logits = x @ self.weights["embedding.weight" if self.config.tied else "head.weight"].T
        if self.config.output_bias:
            logits = logits + self.weights["head.bias"]
        if self.config.softcap is not None:
            logits = self.config.softcap * torch.tanh(logits / self.config.softcap)
        return logits

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        rows = []
        for row in x:
            mean = row.sum() / len(row) if self.config.norm.kind == "layer" else 0.0
            centred = row - mean
            scaled = centred / torch.sqrt((centred * centred).sum() / len(row) + self.config.norm.eps)
            rows.append(scaled * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0.0))
        return torch.stack(rows)

    def _angles(self, place: int) -> Tensor:
        config, turns = self.config.position, []
        for i in range(self.config.head_width // 2):
            frequency = config.theta ** (-2 * i / self.config.head_width)
            if config.scaling == "linear":
                frequency /= config.scaling_factor
            if config.scaling == "llama3":
                frequency = _llama3(frequency, config)
            turns.append(complex(math.cos(place * frequency), math.sin(place * frequency)))
        return torch.tensor(turns, dtype=torch.complex128)

    def _waves(self, place: int) -> Tensor:
        N, wave = self.config.dim, []
        for i in range(N // 2):
            angle = place / 10_000 ** (2 * i / N)
            wave += [math.sin(angle), math.cos(angle)]
        return torch.tensor(wave, dtype=torch.float64)


def _places(documents: list[int]) -> list[int]:
    places: list[int] = []
    for t, document in enumerate(documents):
        places.append(places[-1] + 1 if t and document == documents[t - 1] else 0)
    return places


def _activate(kind: str, x: Tensor) -> Tensor:
    one = {
        "gelu": lambda a: a * 0.5 * (1 + math.erf(a / math.sqrt(2))),
        "gelu-tanh": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
        "relu": lambda a: max(a, 0.0),
        "relu2": lambda a: max(a, 0.0) ** 2,
        "silu": lambda a: a / (1 + math.exp(-a)),
        "tanh": math.tanh,
    }[kind]
    return torch.tensor([[one(a) for a in row] for row in x.tolist()], dtype=torch.float64)


def _slopes(heads: int) -> list[float]:
    """Press et al. 2021, §3, with the rule of their code for other than powers of two."""
    if math.log2(heads).is_integer():
        return [2 ** (-8 / heads * (i + 1)) for i in range(heads)]
    power = 2 ** int(math.log2(heads))
    return _slopes(power) + _slopes(2 * power)[0::2][: heads - power]


def _llama3(frequency: float, config: PositionConfig) -> float:
    """By wavelengths, as the Llama 3.1 release states it."""
    wavelength = 2 * math.pi / frequency
    longest_kept = config.original_context / config.high_frequency_factor
    shortest_scaled = config.original_context / config.low_frequency_factor
    if wavelength < longest_kept:
        return frequency
    if wavelength > shortest_scaled:
        return frequency / config.scaling_factor
    smooth = (config.original_context / wavelength - config.low_frequency_factor) / (
        config.high_frequency_factor - config.low_frequency_factor
    )
    return (1 - smooth) * frequency / config.scaling_factor + smooth * frequency
