"""`Group`: one of several processes that train together. What each question is for stands in distributed.py.

Small things (counts, losses, signals) go through the CPU, so that no GPU is waited for; gradients go whichever way the
backend takes. Checkpoints have a line of their own, since they are written while training goes on.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.config import Settings, TrainConfig, UserError
from minillm.data.batch import Batch
from minillm.training import checkpoint, nonfinite, parts
from minillm.training.distributed import Alone, Call, whole
from minillm.training.logs import Logs
from minillm.training.muon import SharedMuon
from minillm.training.objectives import Objective
from minillm.training.plan import choose_device
from minillm.training.signals import Signals, Stopped
from minillm.training.spread import replicated, sharded
from minillm.training.state import pack, unshare
from minillm.training.watch import Watch

SETTLING = 6.0
"""Seconds in which a rank that meets an error finds out whether another one is the cause."""


class Group(Alone):
    muon = SharedMuon

    def __init__(self, store: Any, rank: int, size: int, logs: Logs):
        self.rank, self.size, self.store, self.logs = rank, size, store, logs
        self.talk = dist.new_group(backend="gloo")
        self.writing = dist.new_group(backend="gloo")
        self.writers = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.saving: Future | None = None
        self.shards = False
        self.turns = 0
        data = dist.group.WORLD
        self.watch = Watch(
            store, rank, size, limit=20.0, terminal=logs.terminal,
            begun=lambda: self.talk._get_sequence_number_for_group() + data._get_sequence_number_for_group(),
        )  # fmt: skip
        self.barrier()
        self.watch.start()

    def barrier(self) -> None:
        dist.barrier(self.talk)

    def check(self, settings: Settings) -> None:
        train, size = settings.train, self.size
        if train.batch % size:
            near = size * max(1, round(train.batch / size))
            raise UserError(f"train.batch ({train.batch}) cannot be shared out evenly by {size} processes; take {near}")
        if train.parallel == "ddp" and train.reduce_dtype == "bf16" and choose_device(settings.device).type != "cuda":
            raise UserError("train.reduce_dtype=bf16 needs GPUs with ddp; leave it out, or take --train.parallel fsdp")
        if train.parallel == "fsdp":
            if size % (train.shard_ranks or size):
                raise UserError(f"train.shard_ranks ({train.shard_ranks}) must divide the number of processes ({size})")
            if settings.dtype == "fp16":
                raise UserError("--dtype fp16 needs one scale for all processes, which fsdp does not have: take bf16")
            if settings.compile == "on":
                raise UserError("--compile on does not go with train.parallel=fsdp; leave it out, or take ddp")

    def rows(self, batch: int) -> tuple[int, int]:
        return self.rank * (batch // self.size), batch // self.size

    def compiles(self, config: TrainConfig) -> bool:
        return config.parallel != "fsdp"

    def threads(self, cores: int, known: int | None) -> int:
        return max(1, cores // self.neighbours)

    @property
    def neighbours(self) -> int:
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size))

    def log_to(self, run: Path) -> None:
        self.watch.where = str(run / "logs" / "rank-{}.log")
        self.logs.go_to(run / "logs" / f"rank-{self.rank}.log")

    @contextmanager
    def lead_first(self) -> Iterator[None]:
        self.turns += 1
        key = f"turn/{self.turns}"
        while not self.lead and not self.store.check([key]):
            time.sleep(0.1)
        yield
        if self.lead:
            self.store.set(key, "over")

    def share(self, value: Any) -> Any:
        values = [value]
        dist.broadcast_object_list(values, 0, group=self.talk)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.talk)
        return values

    def total(self, value: float) -> float:
        sum_ = torch.tensor(value, dtype=torch.float64)  # exact for counts, too
        dist.all_reduce(sum_, group=self.talk)
        return type(value)(sum_.item())

    def slowest(self, seconds: float) -> float:
        longest = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.talk)
        return longest.item()

    def any(self, flags: Tensor) -> Tensor:
        bytes_ = flags.to("cpu", torch.uint8)
        dist.all_reduce(bytes_, dist.ReduceOp.MAX, group=self.talk)
        return bytes_.bool()

    def poll(self, signals: Signals, *, midway: bool = False) -> None:
        if midway:
            return
        asked = torch.tensor([signals.stop or 0, int(signals.asked_to_save)])
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.talk)
        stop, save = asked.tolist()
        if save:
            signals.save, signals.asked_to_save = True, False
        if stop:
            raise Stopped(stop)

    def spread(self, model: nn.Module, config: TrainConfig) -> Call:
        self.shards = config.parallel == "fsdp"
        return (sharded if self.shards else replicated)(model, config, self.size)

    @torch.no_grad()
    def whole_model(self, model: nn.Module, *, everywhere: bool = False) -> nn.Module | None:
        if not self.shards:
            return model if everywhere or self.lead else None
        weights = {name: whole(x) for name, x in model.state_dict().items()}
        gradients = {name: whole(p.grad) for name, p in model.named_parameters() if everywhere and p.grad is not None}
        if not (everywhere or self.lead):
            return None
        with torch.device("meta"):
            copy = type(model)(model.config)
        copy.load_state_dict(weights, assign=True)
        for name, p in copy.named_parameters():
            p.grad = gradients.get(name)
        return copy.train(model.training)

    def locate(self, model: nn.Module, batch: Batch, objective: Objective) -> tuple[str, list[int]]:
        copy = self.whole_model(model, everywhere=True)
        assert copy is not None
        found = self.gather(nonfinite.locate(copy, batch, objective))
        # A rank whose own rows are sound finds no more than the gradient that it got from the others.
        order = ("(weight)", "(output)", "loss", "(gradient)")
        ranked = [min(i for i, kind in enumerate(order) if layer.endswith(kind)) for layer, _ in found]
        worst = [each for each, place in zip(found, ranked, strict=True) if place == min(ranked)]
        return worst[0][0], sorted({sample for _, samples in worst for sample in samples})

    @contextmanager
    def training(self, config: TrainConfig) -> Iterator[None]:
        self.barrier()
        self.watch.judge.limit, self.watch.training = config.stall_seconds, True
        yield
        self.settle()
        self.barrier()
        self.watch.training = False

    def busy(self, what: str) -> AbstractContextManager[None]:
        return self.watch.busy(what)

    def save(self, run: Path, step: int, **content: Any) -> None:
        self.settle()
        state = content["state"]
        content["state"] = {**state, "random_of_ranks": self.gather(state["random"])}
        with self.busy("saving"):
            if self.shards:
                self._save_parts(run, step, **content)
            elif self.lead:
                checkpoint.save(run, step, **content)

    def _save_parts(self, run: Path, step: int, *, weights: dict[str, Tensor], state: Any, **content: Any) -> None:
        """Each rank its own parts, the lead the rest; training goes on while they are written."""
        packed, tensors = pack(state)
        divided = {name: x for name, x in tensors.items() if hasattr(x, "device_mesh")}
        rest = {name: x for name, x in tensors.items() if name not in divided}
        divided = {**_named(parts.STATE, divided), **_named(parts.WEIGHTS, weights)}
        open_folder, temporary = ExitStack(), None
        if self.lead:
            files, room = {"state.safetensors": unshare(rest)}, sum(x.nbytes for x in divided.values())
            begun = checkpoint.writing(run, step, files=files, packed=packed, besides=room, **content)
            temporary = open_folder.enter_context(begun)
        temporary = self.share(temporary)
        written = parts.write(temporary / checkpoint.PARTS, divided, self.writing)
        self.saving = self.writers.submit(_finish, open_folder, written)

    def settle(self) -> None:
        if self.saving is not None:
            saving, self.saving = self.saving, None
            with self.busy("saving"):
                saving.result()
            self.barrier()  # only the lead knows when the folder is in its place

    def random_of(self, state: dict[str, Any]) -> dict[str, Any] | None:
        known = state.get("random_of_ranks", [state["random"]])
        return known[self.rank] if self.rank < len(known) else None


def _named(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kind + name: x for name, x in tensors.items()}


def _finish(open_folder: ExitStack, written: Future) -> None:
    with open_folder:
        parts.settle(written)


@contextmanager
def joined() -> Iterator[Group]:
    """This process as a rank of the group that the environment names; ends it in order, or tells the others why not."""
    rank = int(os.environ["RANK"])
    logs = Logs(rank)
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun may keep the store over its attempts, and what the ranks of the last one left there leads nowhere.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
    group = Group(store, rank, size, logs)
    try:
        yield group
        group.watch.end()
        dist.destroy_process_group()
    except BaseException as error:
        threading.Thread(target=_leave, daemon=True).start()
        if isinstance(error, RuntimeError):  # of a collective because another rank is gone, or this rank's own
            group.watch.await_verdict(SETTLING)
        if isinstance(error, Stopped):
            group.watch.end(stopped=error.number)
        else:
            group.watch.end(_last_words(error))
        if not isinstance(error, (UserError, Stopped, SystemExit)):
            logs.broke_down()
        raise


def _last_words(error: BaseException) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _leave() -> None:
    """Whatever still waits for the other ranks must not keep a process that has failed."""
    time.sleep(3 * SETTLING)
    os._exit(1)
