"""LoRA, AdaLoRA, prefix and prompt in the PEFT library's file format, both ways.

    base_model.model.<their module>.lora_A.weight [r, in], .lora_B.weight [out, r]           LoRA
    base_model.model.<their module>.lora_A [r, in], .lora_E [r, 1], .lora_B [out, r]         AdaLoRA, ranks kept only
    prompt_embeddings [P, layers · 2 · G · D] or [P, dim]                                    prefix, prompt of a decoder

and adapter_config.json beside them. AdaLoRA's rank_pattern says for each module which of its init_r ranks were kept.
"""

import re
from typing import Any

import torch
from torch import Tensor

from minillm.config import UserError
from minillm.model.transformer import Front
from minillm.peft.adalora import SvdLinear
from minillm.peft.config import MethodConfig
from minillm.peft.inject import Adapted
from minillm.peft.lora import LoraLinear
from minillm.peft.places import Place, Rename, by_module, join, part_of
from minillm.peft.prefix import PrefixFront, PromptFront

BEFORE = "base_model.model."
TYPES = {"LORA": "lora", "ADALORA": "adalora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
_UPDATE = re.compile(r"(.+)\.lora_([ABE])(?:\.weight)?")


def is_exchangeable(adapted: Adapted) -> bool:
    """Whether the PEFT library has this method; prefix and prompt it has for decoders only."""
    method = adapted.config.method
    return method in ("lora", "adalora") or (method in ("prefix", "prompt") and set(adapted.fronts) == {"decoder"})


def write(adapted: Adapted, rename: Rename) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and adapter_config.json of what a method that `is_exchangeable` has learned, `extra` left out."""
    peft_type = {method: kind for kind, method in TYPES.items()}[adapted.config.method]
    tensors, config = {
        "lora": _write_lora, "adalora": _write_adalora, "prefix": _write_front, "prompt": _write_front
    }[adapted.config.method](adapted, rename)  # fmt: skip
    task = "CAUSAL_LM" if adapted.transformer.config.shape == "decoder" else None
    return tensors, {"peft_type": peft_type, "task_type": task, "inference_mode": True, **config}


def _write_lora(adapted: Adapted, rename: Rename) -> tuple[dict[str, Tensor], dict[str, Any]]:
    grown, config = adapted.grown, adapted.config
    tensors, ranks, alphas = {}, {}, {}
    modules = by_module(grown, rename)
    for module, layers in modules.items():
        A, B = join([(place, grown[name].lora_A.detach(), grown[name].lora_B.detach()) for place, name in layers])
        tensors |= {f"{BEFORE}{module}.lora_A.weight": A, f"{BEFORE}{module}.lora_B.weight": B}
        if len(A) != config.rank:
            ranks[module] = len(A)
        if (alpha := grown[layers[0][1]].scale * len(A)) != config.scale * config.rank:
            alphas[module] = _whole(alpha)
    about = {"r": config.rank, "lora_alpha": _whole(config.scale * config.rank)}
    return tensors, {**about, "rank_pattern": ranks, "alpha_pattern": alphas, **_linear(config, modules)}


def _write_adalora(adapted: Adapted, rename: Rename) -> tuple[dict[str, Tensor], dict[str, Any]]:
    grown, config = adapted.grown, adapted.config
    modules = by_module(grown, rename)
    start = config.start_rank * max(len(layers) for layers in modules.values())  # one for all modules
    tensors, pattern = {}, {}
    for module, layers in modules.items():
        kept = torch.cat([grown[name].kept for _, name in layers])
        A, B = join([(place, grown[name].lora_A.detach(), grown[name].lora_B.detach()) for place, name in layers])
        E = torch.cat([grown[name].lora_E.detach() for _, name in layers])
        tensors |= {
            f"{BEFORE}{module}.lora_{x}": value for x, value in (("A", A[kept]), ("E", E[kept]), ("B", B[:, kept]))
        }
        pattern[f"{module}.lora_E"] = [*kept.tolist(), *[False] * (start - len(kept))]
    about = {"init_r": start, "target_r": config.rank, "lora_alpha": _whole(config.scale * start)}
    schedule = {"tinit": 0, "tfinal": 0, "total_step": 1}  # PEFT wants some; these ranks move no more
    return tensors, {**about, **schedule, "rank_pattern": pattern, **_linear(config, modules)}


def _linear(config: MethodConfig, modules: dict[str, list[tuple[Place, str]]]) -> dict[str, Any]:
    transposed = any(layers[0][0].transposed for layers in modules.values())
    return {
        "target_modules": sorted(modules), "lora_dropout": config.dropout, "fan_in_fan_out": transposed, "bias": "none"
    }  # fmt: skip


def _write_front(adapted: Adapted, rename: Rename) -> tuple[dict[str, Tensor], dict[str, Any]]:
    front, shape = adapted.fronts["decoder"], adapted.transformer.config
    about: dict[str, Any] = {"num_virtual_tokens": front.length, "num_transformer_submodules": 1}
    about["num_layers"] = len(adapted.transformer.decoder.blocks)
    if isinstance(front, PrefixFront):
        width = shape.key_value_heads * shape.head_width
        heads = {"token_dim": width, "num_attention_heads": shape.key_value_heads, "prefix_projection": False}
        return {"prompt_embeddings": front.vectors().detach()}, {**about, **heads, "encoder_hidden_size": width}
    heads = {"token_dim": shape.dim, "num_attention_heads": shape.heads, "prompt_tuning_init": "RANDOM"}
    return {"prompt_embeddings": front.prompt.detach()}, {**about, **heads}


def _whole(value: float) -> int | float:
    """Products of floats miss whole numbers by a rounding error, and PEFT's alpha is one as a rule."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value


def read_config(values: dict[str, Any]) -> MethodConfig:
    """PEFT's adapter_config.json as ours. Raises UserError by name for what has no counterpart here."""
    kind = values.get("peft_type")
    if kind not in TYPES:
        raise UserError(f"peft_type={kind} is not supported; {', '.join(TYPES)} are")
    for name, plain in (("use_dora", False), ("bias", "none"), ("lora_bias", False), ("layer_replication", None)):
        if values.get(name) not in (plain, None):
            raise UserError(f"{name}={values[name]} is not supported; the adapter must have {name}={plain}")
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if values.get(name):
            raise UserError(f"{name}={values[name]} is not supported: those weights have no place in a method here")
    if kind == "LORA":
        return MethodConfig(method="lora", rank=values["r"], alpha=values["lora_alpha"], dropout=values["lora_dropout"])
    if kind == "ADALORA":
        return MethodConfig(
            method="adalora",
            rank=min(values["target_r"], values["init_r"]),
            initial_rank=values["init_r"],
            alpha=values["lora_alpha"],
            dropout=values["lora_dropout"],
        )
    return MethodConfig(method=TYPES[kind], length=values["num_virtual_tokens"])


def read(adapted: Adapted, tensors: dict[str, Tensor], values: dict[str, Any], rename: Rename, where: str) -> None:
    """Puts what `write`, or PEFT, wrote into the model.

    Raises UserError naming the tensor that the model has no layer for, or one of another shape.
    """
    if adapted.config.method in ("prefix", "prompt"):
        _read_front(adapted, tensors, where)
        return
    linear = [n for n, m in adapted.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    modules = by_module((name for name in linear if ".blocks." in name), rename)
    lora = adapted.config.method == "lora"
    for module, update in _updates(tensors, {"A", "B"} if lora else {"A", "B", "E"}, where).items():
        if module not in modules:
            raise UserError(f"{where}: the model has no layer for {module}; the adapter belongs to another model")
        for place, name in modules[module]:
            linear_layer = adapted.transformer.get_submodule(name)
            A, B = update["A"], update["B"]
            shapes = [(len(A), linear_layer.in_features), (place.parts * linear_layer.out_features, len(A))]
            if [A.shape, B.shape] != shapes:
                raise UserError(
                    f"{where}: lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} of {module} do not fit a layer of "
                    f"{shapes[0][1]} -> {shapes[1][0]}; the adapter belongs to another model"
                )
            mine = {**update, "B": part_of(place, B)}
            if place.parts > 1 and B.any() and not mine["B"].any():
                continue  # a joined update that leaves this part as it is
            (_read_lora if lora else _read_adalora)(adapted, name, place, mine, values)


def _updates(tensors: dict[str, Tensor], letters: set[str], where: str) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": …, "B": …, with AdaLoRA "E": …}}"""
    updates: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _UPDATE.fullmatch(key.removeprefix(BEFORE))
        if found is None:
            raise UserError(f"{where}: {key} is no tensor of LoRA or AdaLoRA")
        updates.setdefault(found[1], {})[found[2]] = tensor
    for module, update in updates.items():
        if update.keys() != letters:
            raise UserError(f"{where}: {module} has lora_{', lora_'.join(sorted(update))}, and needs {sorted(letters)}")
    return updates


def _read_lora(adapted: Adapted, name: str, place: Place, update: dict[str, Tensor], values: dict[str, Any]) -> None:
    A, B = update["A"], update["B"]
    alpha = _pattern(values.get("alpha_pattern"), place.module, values["lora_alpha"])
    scale = alpha / (len(A) ** 0.5 if values.get("use_rslora") else len(A))
    used = B.any(0)  # of a joined update, the other columns are another part's
    if place.parts > 1 and used.any():
        A, B = A[used], B[:, used]
    adapted.grow(name, lambda linear: LoraLinear(linear, len(A), scale, adapted.config.dropout))
    layer = adapted.transformer.get_submodule(name)
    _copy(layer.lora_A, A)
    _copy(layer.lora_B, B)


def _read_adalora(adapted: Adapted, name: str, place: Place, update: dict[str, Tensor], values: dict[str, Any]) -> None:
    rank, config = values["init_r"], adapted.config
    pattern = (values.get("rank_pattern") or {}).get(f"{place.module}.lora_E", [True] * len(update["A"]))
    kept = torch.zeros(rank, dtype=torch.bool)
    kept[: len(pattern)] = torch.tensor(pattern, dtype=torch.bool)
    adapted.grow(name, lambda linear: SvdLinear(linear, rank, config.scale, config.dropout))
    layer = adapted.transformer.get_submodule(name)
    layer.kept.copy_(kept)
    for own, value, index in (("lora_A", "A", kept), ("lora_E", "E", kept), ("lora_B", "B", (slice(None), kept))):
        whole = torch.zeros_like(getattr(layer, own))
        whole[index] = update[value].to(whole)
        _copy(getattr(layer, own), whole)


def _pattern(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's patterns are regular expressions for the end of a module's name; the first that fits counts."""
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _read_front(adapted: Adapted, tensors: dict[str, Tensor], where: str) -> None:
    transformer, config = adapted.transformer, adapted.config
    if set(tensors) != {"prompt_embeddings"} or transformer.config.shape != "decoder":
        raise UserError(f"{where}: prefix and prompt in PEFT's format are one tensor, prompt_embeddings, for a decoder")
    vectors, shape = tensors["prompt_embeddings"].to(transformer.embedding.weight), transformer.config
    layers = len(transformer.decoder.blocks)
    prefix = config.method == "prefix"
    width = 2 * layers * shape.key_value_heads * shape.head_width if prefix else shape.dim
    if vectors.shape != (config.length, width):
        raise UserError(
            f"{where}: prompt_embeddings is {tuple(vectors.shape)}, and this model needs {(config.length, width)}; the "
            "adapter belongs to another model"
        )
    front: Front = PromptFront(shape, vectors)
    if prefix:
        front = PrefixFront(shape, layers, config.length, None, transformer.embedding.weight)
        _copy(front.prefix, vectors)
    transformer.decoder.front = front.train(transformer.training)


@torch.no_grad()
def _copy(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)
