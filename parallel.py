"""One run in several processes: torchrun --nproc-per-node N train.py ...

Every process holds the whole model and a share of every batch; DistributedDataParallel takes the
mean of their gradients. What a batch is, and the noise that is drawn for each of its images, does
not depend on the number of processes, and so, but for rounding, neither does the result.

Without torchrun there is one process, and everything here does nothing.
"""

import contextlib
import datetime
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import rewards
from data import pick_device
from files import UserError

T = TypeVar("T")
RANK, SIZE, LOCAL_RANK = (  # LOCAL_RANK is the process's number on its machine
    int(os.environ.get(name, default)) if "RANK" in os.environ else default
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
)
FIRST = RANK == 0  # the process that writes and prints
PATIENCE = 20  # seconds that a process which was asked to end may be stuck in waiting for others


# --------------------------------------------------------------------------------------------------
# The group


@contextlib.contextmanager
def group() -> Iterator[None]:
    """Joins the other processes for as long as the block lasts. A process that another one is lost
    to ends with UserError."""
    if SIZE == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
        yield
        wait()  # no one leaves while another still needs it
    except ValueError as error:
        if dist.is_initialized():
            raise
        raise UserError(f"{str(error).splitlines()[0]}: start with torchrun") from None
    except RuntimeError as error:  # gloo has no class of its own
        words = ("gloo", "nccl", "peer", "connection", "timed out")
        if not any(word in str(error).lower() for word in words):
            raise
        raise UserError(lost()) from None
    finally:
        together = sys.exc_info()[0] in (None, SystemExit)  # else it might wait for the lost one
        if dist.is_initialized() and together:
            dist.destroy_process_group()


def lost() -> str:
    return (
        f"process {RANK + 1} of {SIZE} has lost another one: go on from the last checkpoint with "
        "--resume, on any number of processes"
    )


def own_device(name: str) -> torch.device:
    """This process's device: the graphics processor of its number on this machine, or the CPU."""
    device = pick_device(name)
    if SIZE == 1 or device.type == "cpu":
        return device
    if device.index is not None:
        raise UserError(
            f"--device {name}: under torchrun each process takes its own: --device cuda"
        )
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise UserError(
            f"process {LOCAL_RANK + 1} of this machine has no CUDA device of its own: "
            f"--nproc-per-node {torch.cuda.device_count()} at most, or --device cpu"
        )
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, or the UserError it ends with, in all processes."""
    if SIZE == 1:
        return make()
    found: list[Any] = [None, None]
    if FIRST:
        try:
            found[0] = make()
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found, device=torch.device("cpu"))
    if found[1] is None:
        return found[0]
    if FIRST:
        raise UserError(found[1])
    raise SystemExit(2)  # the first one says why


@contextlib.contextmanager
def one_before_others() -> Iterator[None]:
    """The block in one process of each machine, and then in its others: what the first one
    downloads or decodes the others find."""
    if LOCAL_RANK > 0:
        wait()
    yield
    if LOCAL_RANK == 0:
        wait()


def total(values: Tensor) -> Tensor:
    """The sum of the processes' tensors, in place."""
    if SIZE > 1:
        dist.all_reduce(values)
    return values


def any_of(flags: list[bool]) -> list[bool]:
    """Whether any process says so, for each flag."""
    if SIZE == 1:
        return flags
    return [count > 0 for count in total(torch.tensor(flags, dtype=torch.int64)).tolist()]


def first_says(value: float) -> float:
    """The first process's value."""
    return total(torch.tensor(value if FIRST else 0.0, dtype=torch.float64)).item()


def wait() -> None:
    """Until all processes have come here."""
    any_of([True])


class StuckAfterSignal:
    """Ends a process that SIGTERM finds waiting for another one, where no handler of Python's runs:
    when a process dies, torchrun asks the rest to end."""

    def __enter__(self) -> "StuckAfterSignal":
        self.done = threading.Event()
        if SIZE > 1:
            read, write = os.pipe()
            os.set_blocking(write, False)
            self.before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=self.watch, args=(read,), daemon=True).start()
        return self

    def watch(self, pipe: int) -> None:
        os.read(pipe, 1)
        if not self.done.wait(PATIENCE):
            print(lost(), file=sys.stderr, flush=True)
            os._exit(2)

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        if SIZE > 1:
            signal.set_wakeup_fd(self.before)


# --------------------------------------------------------------------------------------------------
# Sharing a batch


class Share(rewards.Share):
    """The images of a batch that a process holds. Of one too small for all, each holds them all."""

    def __init__(self, whole: int):
        alone = whole < SIZE
        super().__init__(whole, 0 if alone else RANK, 1 if alone else SIZE)

    def of_rows(self, rows: Tensor) -> Tensor:
        return rows[self.first :: self.of]

    def mean(self, values: Tensor) -> Tensor:
        return total(values.sum(dim=-1) / self.whole) if self.of > 1 else values.mean(dim=-1)


class SameNoise(TorchFunctionMode):
    """Random numbers for the rows of a share are those that one process would draw for them.

    Every process draws for the whole batch and keeps its rows, which costs little beside a network.
    It knows numbers for k rows an image, path after path; any other number of rows, as paths that
    are sampled have with --skip sample, get numbers of their own.
    """

    def __init__(self, share: rewards.Share):
        super().__init__()
        self.share = share
        self.held = len(range(share.first, share.whole, share.of))

    def rows(self, shape: tuple[int, ...], draw: Callable[[tuple[int, ...]], Tensor]) -> Tensor:
        of, whole, first = self.share.of, self.share.whole, self.share.first
        paths, rest = divmod(shape[0], self.held)
        if rest or not paths:
            return draw((of, whole, *shape[1:]))[first, : shape[0]]
        return draw((paths, whole, *shape[1:]))[:, first::of].flatten(0, 1)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ and len(args) == 1 and not kwargs:
            like = args[0]
            return self.rows(tuple(like.shape), lambda shape: like.new_empty(shape).normal_())
        if func is torch.rand:
            return self.rows(tuple(args[0]), lambda shape: torch.rand(shape, **kwargs))
        if func is torch.normal:
            mean, std = args
            return mean + std * self.rows(
                tuple(mean.shape), lambda shape: mean.new_empty(shape).normal_()
            )
        return func(*args, **kwargs)


def same_noise(share: rewards.Share) -> contextlib.AbstractContextManager:
    return SameNoise(share) if share.of > 1 else contextlib.nullcontext()


class Objective(nn.Module):
    """A run's losses as one module, for DistributedDataParallel takes modules."""

    def __init__(self, model: nn.Module, losses: list[Callable], compiled: list[Callable]):
        super().__init__()
        self.model, self.losses, self.compiled = model, losses, compiled

    def forward(self, which: int, x: Tensor, compiled: bool, **terms: Any) -> rewards.Loss:
        if compiled:
            return self.compiled[which](self.model, x, **terms)
        with parametrize.cached():  # each normalised weight once, not once a path
            return self.losses[which](self.model, x, **terms)


def distributed(objective: Objective, each_uses_all: bool) -> nn.Module:
    """The objective whose gradients are the mean over the processes. `each_uses_all` says whether
    every loss moves all parameters."""
    if SIZE == 1:
        return objective
    # Of kernels of 1x1, strides say nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        objective, find_unused_parameters=not each_uses_all, broadcast_buffers=False
    )


def keeping_gradients(objective: nn.Module, keep: bool) -> contextlib.AbstractContextManager:
    """Gradients stay with their processes: for all but the last part of a batch."""
    return objective.no_sync() if SIZE > 1 and keep else contextlib.nullcontext()
