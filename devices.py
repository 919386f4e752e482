"""Where a run computes: processor or GPU, arithmetic, CUDA graphs, the processes of torchrun.

Commands import this file first: threads wait for one another as the environment says when torch is
loaded. By default they spin, and beside another process on the same cores they wait for minutes.
"""

import contextlib
import ctypes
import datetime
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if not any(name.startswith(("OMP_", "GOMP_")) for name in os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"

import torch
import torch.distributed as dist
from torch import Tensor

from files import UserError

# Under torchrun every process takes its rows of each batch; the first one evaluates and writes.
RANK, LOCAL_RANK, SIZE, LOCAL_SIZE = (
    int(os.environ[name]) if dist.is_torchelastic_launched() else alone
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1))
)
FIRST = RANK == 0


def pick_device(name: str) -> torch.device:
    """The device named "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not (name[:5] == "cuda:" and name[5:].isdigit()):
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name}: no CUDA device here, or too few: choose --device cpu")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "float32", "bfloat16", or "auto": bfloat16 where the processor has instructions for it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older PyTorch lacks it
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, up to 1 GiB, instead of giving it back to the system page by
    page and asking for it again in the next update, which took a tenth of the time on a CPU."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no mallopt elsewhere
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD of malloc.h
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def seeded(device: torch.device, seed: int = 0) -> Iterator[None]:
    """The same random numbers each time; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def commit() -> str | None:
    """The commit of this code, with "-dirty" where files have changed since; None where git does
    not have this file."""
    tracked = ["git", "ls-files", "--error-unmatch", __file__]
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    options = dict(cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        subprocess.check_output(tracked, **options)
        return subprocess.check_output(describe, **options).strip()
    return None


def origin(device: torch.device, dtype: torch.dtype) -> dict:
    """What a run is made by: processor or GPU, threads, arithmetic, PyTorch and commit."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
            name = file.read().partition("model name\t: ")[2].partition("\n")[0] or name
    about = {"device": name, "threads": torch.get_num_threads()}
    about["dtype"] = str(dtype).removeprefix("torch.")
    return about | {"torch": str(torch.__version__), "commit": commit()}


# --------------------------------------------------------------------------------------------------
# CUDA graphs


class Captured:
    """All updates by a batch, `function(run, x, beta, free_bits)`, as one CUDA graph. Launching its
    thousand small kernels takes longer than running them, so they are recorded once and replayed.

    A replay reads and writes where the recording did. So a batch is first copied there, and the
    KL's weight and the learning rates lie in the device's memory. The free bits are part of the
    program: when they change, it is recorded anew.
    """

    WARM_UP = 2  # batches before the recording, in which libraries choose their algorithms

    def __init__(self, function: Callable, device: torch.device):
        self.function, self.device = function, device
        self.stream = torch.cuda.Stream(device)
        self.beta = torch.ones((), dtype=torch.float64, device=device)
        self.graph, self.seen, self.free_bits = None, 0, 0.0

    def __call__(self, run, x: Tensor, beta: float, free_bits: float) -> Tensor:
        """`function` by a full batch. Counts the updates in `run.updates`, as that does."""
        self.beta.fill_(beta)
        if free_bits != self.free_bits:
            self.graph, self.seen, self.free_bits = None, 0, free_bits
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        if self.seen < self.WARM_UP:
            self.seen += 1
            with torch.cuda.stream(self.stream):  # where the recording will be
                means = self.function(run, x, self.beta, free_bits)
            current.wait_stream(self.stream)
            return means
        if self.graph is None:
            self.x, before = x.clone(), run.updates
            for parameter in run.model.parameters():
                parameter.grad = None
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.means = self.function(run, self.x, self.beta, free_bits)
            self.updates, run.updates = run.updates - before, before
        self.x.copy_(x)
        self.graph.replay()
        run.updates += self.updates
        return self.means.clone()


# --------------------------------------------------------------------------------------------------
# Several processes


def own_rows(rows: Tensor) -> Tensor:
    """This process's part of a batch. All are equal: one that does not divide repeats some rows."""
    if SIZE == 1:
        return rows
    each = -(-len(rows) // SIZE)
    return rows[torch.arange(RANK, each * SIZE, SIZE, device=rows.device) % len(rows)]


@contextlib.contextmanager
def group(checkpoint: Path) -> Iterator[None]:
    """torchrun's processes as one group. When one dies, each other ends, with one line where there
    is a checkpoint to go on from."""
    if SIZE == 1:
        yield
        return

    def lost(*signal_and_frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one line is enough
        if checkpoint.exists():
            print(
                f"process {RANK + 1} of {SIZE} has lost another one: go on from the last "
                "checkpoint with --resume, on any number of processes",
                file=sys.stderr,
            )
        raise SystemExit(2)

    signal.signal(signal.SIGTERM, lost)  # torchrun ends the others so
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=30))
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own
        words = ("gloo", "nccl", "peer", "connection", "timed out")
        if not any(word in str(error).lower() for word in words):
            raise
        lost()
