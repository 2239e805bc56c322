"""Low-rank adapters on chosen experts, through peft: a frozen base and few trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "default"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which experts get adapters, and of what size; dropout is always 0.

    ``W x + (alpha / rank) B A x``, B zero at the start, so that the first policy is the base.

    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """

    rank: int = 64
    alpha: float = 128.0
    experts: tuple[str, ...] = ("text", "flow")
    """``text``: the understanding expert, ``flow``: the generation expert."""
    projections: tuple[str, ...] = PROJECTIONS

    def __post_init__(self) -> None:
        for name, given, known in (
            ("experts", self.experts, ("text", "flow")),
            ("projections", self.projections, PROJECTIONS),
        ):
            if not given or set(given) - set(known):
                raise ValueError(
                    f"adapter.lora.{name} is {given}; give some of {', '.join(known)}."
                )
        if self.rank < 1:
            raise ValueError(f"adapter.lora.rank is {self.rank}; give 1 or more.")

    @property
    def pattern(self) -> str:
        """A regular expression over module names, as peft matches it."""
        both = {"text", "flow"} <= set(self.experts)
        suffix = "(_moe_gen)?" if both else "_moe_gen" if "flow" in self.experts else ""
        attention = "|".join(p for p in self.projections if p in PROJECTIONS[:4])
        mlp = "|".join(p for p in self.projections if p in PROJECTIONS[4:])
        parts = [rf"self_attn\.({attention}){suffix}"] if attention else []
        parts += [rf"mlp{suffix}\.({mlp})"] if mlp else []
        return rf".*\.({'|'.join(parts)})"


def add_lora(net: nn.Module, lora: LoRA) -> None:
    """Put adapters into a network and freeze everything else; adapters are float32.

    Raises:
        ImportError: when peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(
            'adapter.lora needs peft: pip install "lightning-unigrpo[lora]".'
        ) from error
    settings: dict[str, Any] = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0}
    inject_adapter_in_model(LoraConfig(target_modules=lora.pattern, **settings), net, NAME)
    for name, parameter in net.named_parameters():
        is_adapter = "lora_" in name
        parameter.requires_grad_(is_adapter)
        if is_adapter:
            parameter.data = parameter.data.float()


def has_lora(net: nn.Module) -> bool:
    """Whether :func:`add_lora` was here."""
    return any("lora_" in name for name, _ in net.named_parameters())


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
def merged_state(net: nn.Module) -> dict[str, Tensor]:
    """Return a network's weights with the adapters added in, under the names of the base.

    The sum is made in float32 and rounded once to the base's dtype.
    """
    from peft.tuners.lora import Linear

    state = dict(net.state_dict())
    for name, module in net.named_modules():
        if isinstance(module, Linear):
            weight: Any = module.get_base_layer().weight
            delta = module.get_delta_weight(NAME)
            state[f"{name}.base_layer.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return {
        name.replace(".base_layer.", "."): value
        for name, value in state.items()
        if "lora_" not in name
    }
