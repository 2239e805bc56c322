"""Start the ranks of one process group on this machine, over gloo, as torchrun would.

A test names a function ``module:name``; every rank calls it with a folder and words, and writes what the test
will compare into that folder.

The imports of a rank take longer than most of what it does. So each is forked from a server that has imported
them and done nothing else: one server for each rank, because ranks that torchrun starts share no hash seed.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.fsdp.wrap import enable_wrap

ROOT = Path(__file__).parent.parent
PRELOADED = ("tests.rank_cases", "tests.resume_cases")
"""Modules that most ranks import."""


# ---- in the test


@functools.cache
def server(rank: int) -> Connection:
    """Start what forks a rank, once for this process; returns the connection to :func:`serve`."""
    here, there = multiprocessing.Pipe()
    code = f"from tests.ranks import serve; serve({there.fileno()})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        pass_fds=[there.fileno()],
    )
    there.close()
    atexit.register(process.wait)
    atexit.register(here.close)  # the last to be registered is the first to be called
    return here


class Rank:
    """One process, with as much of the interface of :class:`subprocess.Popen` as is needed."""

    returncode: int | None = None

    def __init__(self, orders: Connection, *order: Any) -> None:
        self.orders = orders
        orders.send(order)
        self.pid: int = orders.recv()

    def poll(self) -> int | None:
        """Return the exit code; ``None`` = still running."""
        if self.returncode is None:
            self.orders.send(self.pid)
            self.returncode = self.orders.recv()
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Return the exit code; raises :class:`subprocess.TimeoutExpired`."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"rank {self.pid}", timeout)
            time.sleep(0.02)
        return code


class Ranks:
    """Running ranks.

    Args:
        target: ``module:name`` of what each rank calls.
        world_size: number of ranks.
        folder: for what they write; their output goes to ``rank0.log`` and so on.
        words: passed on.
        environment: more variables.
    """

    def __init__(
        self, target: str, world_size: int, folder: Path, *words: str, **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
        common = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test",  # Lightning then starts no processes itself
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        servers = [server(rank) for rank in range(world_size)]  # which begin their imports together
        for orders in servers:
            orders.send(None)
            orders.recv()  # a rank waits for the others 20 s and less: they begin together, too
        self.processes = [
            Rank(
                orders,
                target,
                (str(folder), *words),
                common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                log,
            )
            for rank, (orders, log) in enumerate(zip(servers, self.logs, strict=True))
        ]

    def wait(self, timeout: float = 180) -> list[int]:
        """Return the exit codes; ranks that are not done in time are ended and the test fails."""
        try:
            return [process.wait(timeout) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"ranks hang after {timeout} s:\n{self.output()}") from None
        finally:
            self.kill()

    def kill(self, *ranks: int) -> None:
        """End some ranks at once, or all."""
        for rank in ranks or range(len(self.processes)):
            if self.processes[rank].poll() is None:
                os.kill(self.processes[rank].pid, signal.SIGKILL)
                self.processes[rank].wait(60)

    def output(self, lines: int = 25) -> str:
        """Return the end of what each rank said."""
        tails = [log.read_text(errors="replace").splitlines()[-lines:] for log in self.logs]
        return "\n".join(f"--- rank {n}\n" + "\n".join(tail) for n, tail in enumerate(tails))


def run(target: str, world_size: int, folder: Path, *words: str, timeout: float = 180) -> None:
    """Run ranks to their end, and fail with their output when one of them does."""
    ranks = Ranks(target, world_size, folder, *words)
    codes = ranks.wait(timeout)
    assert codes == [0] * world_size, f"exit codes {codes}\n{ranks.output()}"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- in a rank


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP on CPU processes: torch needs the device named, and Lightning refuses by exact type."""

    def _settings(self) -> dict[str, Any]:
        return {
            "cpu_offload": self.cpu_offload,
            "mixed_precision": self.mixed_precision_config,
            "sharding_strategy": self.sharding_strategy,
            "device_id": torch.device("cpu"),
            **self.kwargs,
        }

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        with enable_wrap(wrapper_cls=FullyShardedDataParallel, **self._settings()):
            yield


def _full_state_dict_context(module: Any, world_size: int, rank0_only: bool = True) -> Any:
    """Lightning's own asks for an offload to the CPU, where the weights are: it frees them and crashes."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


def let_fsdp_run_on_cpus() -> None:
    """Make the literal ``strategy="fsdp"`` mean :class:`CPUFSDPStrategy`, in this process."""
    import lightning.fabric.strategies.fsdp as fabric
    import lightning.pytorch.strategies.fsdp as strategies

    for module in (fabric, strategies):
        module._get_full_state_dict_context = _full_state_dict_context  # type: ignore[attr-defined]
    FSDPStrategy._registered_strategies.clear()
    StrategyRegistry["fsdp"]["strategy"] = CPUFSDPStrategy


def strategy_of(name: str, world_size: int, **settings: Any) -> Strategy | str:
    """Return a strategy by name: ``single``, ``ddp``, ``fsdp``, ``fsdp2``."""
    if name == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, **settings
        )
    made = {"single": None, "ddp": DDPStrategy, "fsdp": CPUFSDPStrategy}[name]
    return "auto" if made is None else made(process_group_backend="gloo", **settings)


def trainer_of(name: str, steps: int, *callbacks: Any, **settings: Any) -> Trainer:
    """Return a quiet trainer over all ranks."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": world_size,
        "strategy": strategy_of(name, world_size),
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return Trainer(**(defaults | settings))


def serve(handle: int) -> None:
    """Fork a rank for each order, and tell its exit code when asked: until then its id is not used again.

    Args:
        handle: file descriptor of the connection to the test.
    """
    orders = Connection(handle)
    ranks: dict[int | None, multiprocessing.Process] = {}
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # else each fork would copy what its collector looks at
    while True:
        try:
            order = orders.recv()
        except EOFError:  # the test has ended, and asks for nobody any more
            for rank in ranks.values():
                rank.kill()
            return
        if order is None:  # asked whether all is imported
            orders.send(None)
        elif isinstance(order, int):
            orders.send(ranks[order].exitcode)
        else:
            rank = multiprocessing.get_context("fork").Process(target=become, args=(orders, *order))
            rank.start()
            ranks[rank.pid] = rank
            orders.send(rank.pid)


def become(
    orders: Connection, target: str, words: Sequence[str], environment: dict[str, str], log: Path
) -> None:
    """Turn a fork of the server into a rank, and do its work."""
    orders.close()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(words[0])
    with log.open("w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if torch.cuda.is_available():  # forks of a process that looked at GPUs cannot use them
        code = "import sys; from tests.ranks import work; work(*sys.argv[1:])"
        os.execv(sys.executable, [sys.executable, "-c", code, target, *words])
    torch.seed(), np.random.seed()  # noqa: NPY002  # as in new processes, whose global generators differ
    work(target, *words)


def work(target: str, folder: str, *words: str) -> None:
    """Call a function, ``module:name``, on this rank."""
    torch.set_num_threads(1)
    let_fsdp_run_on_cpus()
    module, _, name = target.partition(":")
    getattr(importlib.import_module(module), name)(Path(folder), *words)
    # Together: gloo's threads abort a process, seldom, that ends while another still talks to it.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
