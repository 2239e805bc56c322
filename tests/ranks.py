"""Start the ranks of one process group on this machine, over gloo, as torchrun would.

A test names a function ``module:name``; every rank calls it with a folder and words, and writes what the test
will compare into that folder: ``python -m tests.ranks module:name FOLDER WORD ...``.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


# ---- in the test


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
        command = [sys.executable, "-m", "tests.ranks", target, str(folder), *words]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=common | place,
                        cwd=folder,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

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
                self.processes[rank].send_signal(signal.SIGKILL)
                self.processes[rank].wait()

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


def main() -> None:
    """Call the function that the command line names."""
    target, folder, *words = sys.argv[1:]
    torch.set_num_threads(1)
    let_fsdp_run_on_cpus()
    module, _, name = target.partition(":")
    getattr(importlib.import_module(module), name)(Path(folder), *words)
    # Together: gloo's threads abort a process, seldom, that ends while another still talks to it.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
