"""Low-rank adapters through peft: a frozen base and few trained weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

NAME = "default"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Size of the adapters, and which projections of each layer get them; dropout is always 0.

    ``W x + (alpha / rank) B A x``, B zero at the start, so that the first policy is the base.

    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """

    rank: int = 64
    alpha: float = 128.0
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        self.require_known("projections", self.projections, PROJECTIONS)
        self.require_rank()

    def require_rank(self) -> None:
        """Raise a ValueError when there is nothing to train."""
        if self.rank < 1:
            raise ValueError(f"adapter.lora.rank is {self.rank}; give 1 or more.")

    def require_known(self, name: str, given: Sequence[str], known: Sequence[str]) -> None:
        """Raise a ValueError when a field names nothing, or something that is not there."""
        if not given or set(given) - set(known):
            raise ValueError(f"adapter.lora.{name} is {given}; give some of {', '.join(known)}.")

    @property
    def pattern(self) -> str:
        """A regular expression over module names, as peft matches it."""
        return rf".*\.layers\.\d+\.\w+\.({'|'.join(self.projections)})"

    @property
    def scale(self) -> float:
        """What the product of both factors is multiplied by."""
        return self.alpha / self.rank


def add_lora(net: nn.Module, lora: LowRank) -> None:
    """Put adapters into a network and freeze everything else; adapters are float32.

    Those of a network on the meta device are filled by :func:`first_value`.

    Raises:
        ImportError: when peft is missing.
    """
    try:
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            'adapter.lora needs peft: pip install "lightning-unigrpo[lora]".'
        ) from error
    config = _config_of(lora)
    on_meta = any(p.is_meta for p in net.parameters())
    inject_adapter_in_model(config, net, NAME, low_cpu_mem_usage=on_meta)
    for name, parameter in net.named_parameters():
        is_adapter = "lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()


def _config_of(lora: LowRank) -> Any:
    from peft import LoraConfig

    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0}
    return LoraConfig(target_modules=lora.pattern, **settings)


def first_value(name: str, parameter: Tensor) -> Tensor:
    """Return what an adapter's factor begins with, the same on every rank.

    Args:
        name: of the factor in the network; it keys the draw.
        parameter: for its shape.
    """
    if "lora_B" in name:
        return torch.zeros(parameter.shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return nn.init.kaiming_uniform_(
        torch.empty(parameter.shape), a=math.sqrt(5), generator=generator
    )


@contextmanager
def lora_off(net: nn.Module) -> Iterator[None]:
    """Make a network its base, and undo it; which parameters are trained stays as it was."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in net.modules() if isinstance(module, BaseTunerLayer)]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def merged(state: Mapping[str, Tensor], lora: LowRank) -> dict[str, Tensor]:
    """Return weights with the adapters added in, under the names of the base.

    ``W + alpha / rank B A``, in float32 and rounded once to the base's dtype.

    Args:
        state: of a network with adapters.
        lora: their settings.
    """
    found = {}
    for name, value in state.items():
        if "lora_" in name:
            continue
        path = name.removesuffix(".base_layer.weight")
        if path != name and f"{path}.lora_A.{NAME}.weight" in state:
            a, b = (state[f"{path}.lora_{factor}.{NAME}.weight"].float() for factor in "AB")
            value = (value.float() + lora.scale * (b @ a)).to(value.dtype)
        found[base_name(name)] = value
    return found


def save_lora(net: nn.Module, lora: LowRank, folder: Path) -> None:
    """Write the factors alone, in peft's layout: ``adapter_config.json`` and its weights.

    ``PeftModel.from_pretrained(network, folder)`` reads them into a network whose modules are called as here.

    Args:
        net: with adapters.
        lora: their settings.
        folder: made if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _config_of(lora).save_pretrained(folder)
    factors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": value.detach().cpu().contiguous()
        for name, value in net.state_dict().items()
        if "lora_" in name
    }
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def base_name(name: str) -> str:
    """Return what a weight is called without adapters."""
    return name.replace(".base_layer.", ".")
