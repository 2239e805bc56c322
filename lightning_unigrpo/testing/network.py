"""Checks of the network, its parameters, and of words and pixels."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_unigrpo.adapter import Adapter, dropout_rates
from lightning_unigrpo.testing.report import (
    Finding,
    rule,
)
from lightning_unigrpo.testing.subject import (
    Subject,
    apart,
    short_list,
    with_values,
    worst,
)
from lightning_unigrpo.types import (
    TextSegment,
)

# ---- the network and its parameters


@rule(
    "every trainable weight is reached through adapter.net",
    mend="move the module into net; what stays outside must not require gradients",
    bound=0,
)
def weights_under_net(s: Subject) -> Finding:
    """Trainable parameters outside net."""
    inside = {id(p) for p in s.adapter.net.parameters()}
    foreign = [
        name for name, p in s.adapter.named_parameters() if p.requires_grad and id(p) not in inside
    ]
    return Finding(len(foreign), short_list(foreign))


@rule(
    'param_groups() is {"text": [...], "flow": [...]}, disjoint, and holds all trainable weights',
    mend="put each trainable parameter of net into exactly one of the two lists; where names decide, "
    'ask with "in": strategies put words into them',
    bound=0,
)
def param_groups(s: Subject) -> Finding:
    """Weights that are missing, doubled, foreign, or in another group once FSDP has wrapped the network."""
    groups = s.adapter.param_groups()
    if set(groups) != {"text", "flow"}:
        return Finding(math.inf, f"the groups are {sorted(groups)}")
    listed = [id(p) for group in groups.values() for p in group]
    own = {id(p): name for name, p in s.adapter.net.named_parameters()}
    wrong = [
        name
        for i, name in own.items()
        if listed.count(i) > 1
        or (i not in listed and s.adapter.net.get_parameter(name).requires_grad)
    ]
    foreign = [f"a parameter outside net ({i})" for i in listed if i not in own]
    with wrapped(s.adapter):
        later = s.adapter.param_groups()
    for name, group in groups.items():
        moved = {id(p) for p in group} - {id(p) for p in later[name]}
        wrong += [f"{own[i]} no longer in {name!r} when wrapped" for i in moved if i in own]
    return Finding(len(wrong) + len(foreign), short_list(wrong + foreign))


class Wrapped(nn.Module):
    """Stands before a module as FSDP does: there is one more word in every name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._fsdp_wrapped_module, name)


@contextmanager
def wrapped(adapter: Adapter) -> Iterator[None]:
    """Put :class:`Wrapped` before the network and each of its units, and take it away again."""
    net, names = adapter.net, {id(m): name for name, m in adapter.net.named_modules()}
    units = {names[id(unit)]: unit for unit in adapter.shard_units() if id(unit) in names}
    try:
        for name, unit in units.items():
            net.set_submodule(name, Wrapped(unit))
        adapter.net = Wrapped(net)
        yield
    finally:
        adapter.net = net
        for name, unit in units.items():
            net.set_submodule(name, unit)


@rule(
    "nothing drops out: rollout and training would be two policies",
    mend="build the backbone (and its LoRA) with dropout 0",
    bound=0,
)
def no_dropout(s: Subject) -> Finding:
    """Modules with a dropout probability above 0."""
    found = [f"{name} = {rate}" for name, rate in dropout_rates(s.adapter.net).items()]
    return Finding(len(found), short_list(found))


@rule(
    "shard_units() lie inside net, frozen_modules() outside the module tree",
    mend="return submodules of net; keep VAE and ViT in a plain list or tuple, unregistered",
    bound=0,
)
def modules_in_their_place(s: Subject) -> Finding:
    """Units outside net and registered frozen modules."""
    inside = set(s.adapter.net.modules())
    registered = set(s.adapter.modules())
    wrong = [f"unit {type(m).__name__}" for m in s.adapter.shard_units() if m not in inside]
    wrong += [f"frozen {type(m).__name__}" for m in s.adapter.frozen_modules() if m in registered]
    return Finding(len(wrong), short_list(wrong))


@rule(
    "equal arguments give equal answers: nothing is drawn at random, nothing counts calls",
    mend="take the mode of a posterior; keep state in the cache, never in the adapter",
)
def repeatable(s: Subject) -> float:
    """Distance between two runs under different global seeds."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(s.asked(lambda: s.adapter.prefill(s.contexts)))
    return worst([apart(a, b) for a, b in zip(*runs, strict=True)])


@rule(
    "net's state_dict, saved and loaded, gives the same policy to the bit",
    mend="register every buffer that outputs depend on, or derive it from the config",
    bound=0,
)
def state_dict_round_trip(s: Subject) -> float:
    """Change of the outputs after weights were saved, spoilt and loaded."""
    net = s.adapter.net
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    before = s.asked(lambda: s.adapter.prefill(s.contexts))
    with with_values(list(net.parameters()), [torch.ones_like(p) for p in net.parameters()]):
        file.seek(0)
        net.load_state_dict(torch.load(file, map_location=s.device, weights_only=True))
        after = s.asked(lambda: s.adapter.prefill(s.contexts))
    return worst([apart(a, b) for a, b in zip(after, before, strict=True)])


@rule(
    "idle() calls net and each of shard_units() exactly once, and changes nothing",
    mend="run net once, on no rows or on one to throw away: ranks in step gather each unit per call",
    bound=0,
)
def idle(s: Subject) -> Finding:
    """Modules that were not called once, weights and answers that changed."""
    net = s.adapter.net
    calls: dict[nn.Module, int] = dict.fromkeys([net, *s.adapter.shard_units()], 0)

    def count(module: nn.Module, _: object) -> None:
        calls[module] += 1

    values = [*net.parameters(), *net.buffers()]
    kept = [value.clone() for value in values]
    before = s.asked(lambda: s.adapter.prefill(s.contexts))
    handles = [module.register_forward_pre_hook(count) for module in calls]
    try:
        s.adapter.idle()
    finally:
        for handle in handles:
            handle.remove()
    after = s.asked(lambda: s.adapter.prefill(s.contexts))
    names = {module: name for name, module in net.named_modules(prefix="net")}
    wrong = [f"{names[m]} was called {n} times" for m, n in calls.items() if n != 1]
    if not all(map(torch.equal, [*values, *after], [*kept, *before])):
        wrong.append("weights or answers changed")
    return Finding(len(wrong), short_list(wrong))


# ---- words and pixels


@rule(
    "tokenize gives given segments ([L] int64 texts); detokenize leaves the stop token out",
    mend="mind dtype, shape and log_prob=None in tokenize, the stop token in detokenize",
    bound=0,
)
def words(s: Subject) -> Finding:
    """Broken rules of texts."""
    wrong = []
    for prompt, context in zip(s.prompts, s.contexts, strict=True):
        for segment in context:
            if segment.is_sampled:
                wrong.append(f"prompt {prompt.id}: a sampled segment")
            if isinstance(segment, TextSegment) and (
                segment.tokens.ndim != 1 or segment.tokens.dtype != torch.int64
            ):
                wrong.append(f"prompt {prompt.id}: tokens {segment.tokens.dtype}")
    stop = torch.tensor([s.adapter.stop_token], device=s.device)
    for text in s.texts():
        kept = text.tokens[text.tokens != stop]
        if s.adapter.detokenize(torch.cat([kept, stop])) != s.adapter.detokenize(kept):
            wrong.append("detokenize shows the stop token")
    return Finding(len(wrong), short_list(wrong))


@rule(
    "decode gives finite [B, 3, H, W] float32 in [0, 1], of the size asked for, row by row",
    mend="clamp after un-normalising, cast to float32, repeat a grey channel three times",
)
def decode(s: Subject) -> Finding:
    """Distance from the range, and between a batch and its rows; NaN for a wrong shape."""
    codes = 3 * s.noise(range(3)) if s.is_flow else s.codes()
    pixels = s.adapter.decode(codes, s.grid)
    size = s.prompts[0].size
    shape = (3, 3, *(size or pixels.shape[2:]))
    if pixels.shape != shape or pixels.dtype != torch.float32:
        return Finding(
            math.nan, f"{list(pixels.shape)} {pixels.dtype}, expected {list(shape)} float32"
        )
    alone = torch.cat([s.adapter.decode(row.unsqueeze(0), s.grid) for row in codes])
    beyond = float((pixels - pixels.clamp(0, 1)).abs().max())
    return Finding(
        worst([beyond, apart(pixels, alone)]), f"range {pixels.min():.3} to {pixels.max():.3}"
    )
