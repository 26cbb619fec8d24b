"""One mechanism for every method: put it into a model, train what moves, fold it in or take it out again.

full, freeze             nothing is put in; parameters are chosen by name
lora, adalora, adapter   linear layers are exchanged for ones that have grown (linear.py)
prefix, prompt           something stands in front of each stack's documents (prefix.py)

adapted = inject(model, MethodConfig(method="lora"))
… train the parameters that require gradients …
save(adapted, folder); adapted.merge() or adapted.remove()          # saving and loading: files.py
"""

import hashlib
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from minillm.config import UserError
from minillm.model.linear import Linear
from minillm.model.transformer import Front, Transformer
from minillm.peft.adalora import Allocator, SvdLinear
from minillm.peft.adapter import ENDS, AdapterLinear
from minillm.peft.config import MethodConfig
from minillm.peft.depth import depth
from minillm.peft.linear import GrownLinear
from minillm.peft.lora import LoraLinear
from minillm.peft.prefix import PrefixFront, PromptFront


class Adapted:
    """A model with a method in it.

    Args:
        model: a Transformer, or a module that holds exactly one.
        extra: names of modules of `model` that are trained besides, such as a task's head.

    Attributes:
        transformer, prefix: the Transformer inside, and what stands before its parameters' names in `model`'s.
        base: SHA-256 of the Transformer's weights as they were.
        grown: the exchanged layers by their name in the Transformer.
        allocator: AdaLoRA's, to be called around each optimizer step (see `Allocator`); None with other methods.
    """

    def __init__(self, model: nn.Module, config: MethodConfig, extra: Collection[str] = ()):
        found = [(name, m) for name, m in model.named_modules() if isinstance(m, Transformer)]
        if len(found) != 1:
            raise UserError(f"a method goes into a model with one Transformer; this one has {len(found)}")
        name, self.transformer = found[0]
        self.model, self.config, self.extra = model, config, tuple(extra)
        self.prefix = f"{name}." if name else ""
        for module in self.extra:
            if not module or module not in dict(model.named_modules()):
                raise UserError(f"the model has no module {module!r} to train besides")
        if self.grown or self.fronts:
            raise UserError("the model has a method in it already: merge or remove that one first")
        self.base = fingerprint(self.transformer)
        self._required = {name: p.requires_grad for name, p in model.named_parameters()}
        self.allocator: Allocator | None = None

    @property
    def grown(self) -> dict[str, GrownLinear]:
        return {name: m for name, m in self.transformer.named_modules() if isinstance(m, GrownLinear)}

    @property
    def fronts(self) -> dict[str, Front]:
        stacks = {"encoder": self.transformer.encoder, "decoder": self.transformer.decoder}
        return {name: stack.front for name, stack in stacks.items() if stack is not None and stack.front.length}

    def grow(self, name: str, make: Callable[[nn.Linear], nn.Linear]) -> None:
        """Exchanges the layer `name` of the Transformer for what `make` builds from it."""
        parent, _, last = name.rpartition(".")
        layer = make(self.transformer.get_submodule(name))  # type: ignore[arg-type]
        layer.train(self.transformer.training)
        setattr(self.transformer.get_submodule(parent), last, layer)

    def start(self) -> "Adapted":
        """Chooses which parameters require gradients: only those that the method moves, and those of `extra`."""
        wanted = set(self._chosen())
        if not wanted:
            raise UserError(
                "method=freeze leaves nothing to train: the model's output matrix is its embedding; lower "
                "--freeze-layers, or take a task with a head of its own"
            )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted)
        svd = {name: layer for name, layer in self.grown.items() if isinstance(layer, SvdLinear)}
        self.allocator = Allocator(svd, self.config) if svd else None
        return self

    def _chosen(self) -> Iterable[str]:
        """Names of the parameters that move."""
        config = self.config
        added = {f"{self.prefix}{name}.{own}" for name, layer in self.grown.items() for own in layer.own}
        for name, _ in self.model.named_parameters():
            ours = name.startswith(self.prefix)
            inside = name.removeprefix(self.prefix)
            if any(name.startswith(module + ".") for module in self.extra) or config.method == "full":
                yield name
            elif config.train_only == "head":
                if not self.extra and inside.startswith("head."):
                    yield name
            elif config.method == "freeze":
                if not ours or depth(inside, self.transformer.config)[0] > config.freeze_layers:
                    yield name
            elif name in added or inside.startswith(("encoder.front.", "decoder.front.")):
                yield name

    def moved(self) -> dict[str, Tensor]:
        """All that differs from the model as it was, by name in the model: parameters, and which ranks were kept."""
        tensors = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        for name, layer in self.grown.items():
            tensors |= {f"{self.prefix}{name}.{own}": b for own, b in layer.named_buffers(recurse=False)}
        return tensors

    def merge(self) -> None:
        """Folds the updates into plain layers; the model computes the same and holds nothing of the method any more.

        Raises UserError for adapter, prefix and prompt, which are no matrices that could be added. What full and
        freeze moved is in the weights already.
        """
        deltas = {name: layer.delta() for name, layer in self.grown.items()}
        if self.fronts or any(delta is None for delta in deltas.values()):
            raise UserError(f"method={self.config.method} cannot be merged: it adds no matrices; keep it, or remove it")
        for name, delta in deltas.items():
            self.grow(name, lambda old, delta=delta: _plain(old, nn.Parameter(old.weight.detach() + delta)))
        self._restore()

    def remove(self) -> None:
        """Takes the method out; the Transformer is what it was before, bit for bit, unless full or freeze moved it."""
        for name in self.grown:
            self.grow(name, lambda old: _plain(old, old.weight))
        for stack in self.fronts:
            self.transformer.get_submodule(stack).front = Front()
        self._restore()

    def _restore(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._required[name])
        self.allocator = None


def inject(model: nn.Module, config: MethodConfig, *, extra: Collection[str] = ()) -> Adapted:
    """Puts a method into `model`, which computes the same as before (prefix and prompt apart), and freezes the rest.

    New weights are drawn from torch's global generator. `extra` is as for `Adapted`.

    Raises:
        UserError: an option does not fit the model.
    """
    adapted = Adapted(model, config, extra)
    transformer, shape = adapted.transformer, adapted.transformer.config
    if config.freeze_layers is not None and config.freeze_layers > shape.layers:
        raise UserError(f"--freeze-layers {config.freeze_layers}: the model has {shape.layers} layers")
    if config.method in ("lora", "adalora"):
        rank, kind = (config.rank, LoraLinear) if config.method == "lora" else (config.start_rank, SvdLinear)
        for name in target_layers(transformer, config.targets):
            adapted.grow(name, lambda linear: kind(linear, rank, config.scale, config.dropout))
    elif config.method == "adapter":
        for name in target_layers(transformer, ",".join(ENDS)):
            adapted.grow(name, lambda linear: AdapterLinear(linear, config.width))
    elif config.method in ("prefix", "prompt"):
        _put_fronts(transformer, config)
    return adapted.start()


def target_layers(transformer: Transformer, targets: str) -> list[str]:
    """Names of the linear layers inside the blocks whose last part `targets` lists; "all": every one.

    Raises UserError naming a target that no layer has.
    """
    linear = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and ".blocks." in n]
    ends = sorted({name.rpartition(".")[2] for name in linear})
    wanted = ends if targets == "all" else [target.strip() for target in targets.split(",")]
    for target in wanted:
        if target not in ends:
            raise UserError(f"method.targets: this model has no layer {target!r}; it has {', '.join(ends)}, or all")
    return [name for name in linear if name.rpartition(".")[2] in wanted]


def _put_fronts(transformer: Transformer, config: MethodConfig) -> None:
    shape, embedding = transformer.config, transformer.embedding.weight
    if config.length >= shape.context:
        raise UserError(f"method.length ({config.length}) leaves no room in model.context ({shape.context})")
    for stack in (transformer.encoder, transformer.decoder):
        if stack is None:
            continue
        if config.method == "prefix":
            stack.front = PrefixFront(shape, len(stack.blocks), config.length, config.prefix_hidden, embedding)
        else:
            ids = torch.randint(len(embedding), (config.length,)).to(embedding.device)
            scale = shape.dim**0.5 if shape.embedding_scale else 1.0
            stack.front = PromptFront(shape, embedding[ids] * scale)
        stack.front.train(transformer.training)


def _plain(old: nn.Linear, weight: nn.Parameter) -> nn.Linear:
    """A linear layer of this weight and the bias of `old`."""
    linear = Linear(old.in_features, old.out_features, bias=old.bias is not None, device="meta")
    linear.weight, linear.bias = weight, old.bias
    return linear


def fingerprint(transformer: Transformer) -> str:
    """SHA-256 of all weights with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(transformer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def summary(model: nn.Module) -> tuple[int, int]:
    """(numbers that are trained, all numbers) of a model's parameters."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
