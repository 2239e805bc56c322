"""check_adapter passes every adapter, and names what is broken in one that is broken on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_unigrpo.adapters.bagel import BagelAdapter
from lightning_unigrpo.adapters.bagel.packing import Packer
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.testing import CHECKS, Report, check_adapter
from lightning_unigrpo.types import (
    Grid,
    ImageSegment,
    Prompt,
    Scores,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)
from tests.test_bagel_golden import golden_adapter
from tests.toys import Block, Rows, ToyCache, ToyFlow, ToyMasked, ToyTokens


class TinyBagel(BagelAdapter):
    """The golden Bagel with a stand-in for its image decoder."""

    def __init__(self) -> None:
        golden = golden_adapter()
        super().__init__(golden.config, golden.tokenizer, net=golden.net)

    def decode(self, latents: Tensor, grid: Grid) -> Tensor:
        side = self.config.pixels_per_token
        grey = latents.mean(2).sigmoid().view(-1, 1, *grid)
        return grey.repeat_interleave(side, 2).repeat_interleave(side, 3).expand(-1, 3, -1, -1)


class RandomDigits(DigitsAdapter):
    """Random weights: large logits of a trained model would hide errors of rare tokens."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(None)


ADAPTERS = [ToyFlow, ToyTokens, ToyMasked, DigitsAdapter, RandomDigits, TinyBagel]
BAGEL_PROMPTS = [
    Prompt(text="5 6 7", size=(24, 40)),
    Prompt(text="9", id=1, size=(24, 40)),
    Prompt(text="1 2 3 4 5", id=2, size=(32, 16)),
]


def checked(adapter: Any, **settings: Any) -> Report:
    prompts = BAGEL_PROMPTS if isinstance(adapter, TinyBagel) else None
    return check_adapter(adapter, prompts, raise_on_failure=False, **settings)


@pytest.mark.parametrize("build", ADAPTERS)
def test_contract(build: Any) -> None:
    adapter = build()
    before = [p.clone() for p in adapter.parameters()]
    report = checked(adapter, rounds=(1, 2, 3))
    assert not report.failed, str(report)
    assert all(torch.equal(p, old) for p, old in zip(adapter.parameters(), before, strict=True))


@pytest.mark.parametrize("build", [ToyFlow, ToyTokens, ToyMasked])
def test_contract_without_a_second_round(build: Any) -> None:
    report = checked(build(), rounds=(1,))
    assert not report.failed, str(report)


def test_a_failure_says_what_is_wrong_and_how_to_mend_it() -> None:
    adapter = type("Broken", (Faulty, ToyFlow), {})().train()
    state = torch.random.get_rng_state()
    with pytest.raises(
        AssertionError, match=r"FAIL  velocities (.|\n)*9\.9e-03 <= 1e-04(.|\n)*mend:"
    ):
        check_adapter(adapter, rounds=(1,), only=["text_log_probs", "velocities"])
    assert adapter.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_adapter_without_prompts_needs_some() -> None:
    adapter = type("Mute", (ToyFlow,), {"defaults": lambda self: None})()
    with pytest.raises(ValueError, match="prompts="):
        check_adapter(adapter)
    assert not check_adapter(adapter, [Prompt(text="a b")]).failed


# ---- broken on purpose: each mixin spoils one thing


class Shifted:
    """Decoded tokens stand one position too far."""

    def next_logits(self, cache: Any, tokens: Any, active: Tensor) -> Tensor:
        cache.positions = cache.positions + 1
        logits = super().next_logits(cache, tokens, active)
        cache.positions = cache.positions - 1
        return logits


class ShiftedImage:
    """The noise block stands one position too far."""

    def velocity(self, cache: Any, *args: Any) -> Tensor:
        moved = cache.select(torch.arange(len(cache)))
        moved.positions = moved.positions + 1
        return super().velocity(moved, *args)


class WrongMarks:
    """Image marks have wrong weights, in the cached path only."""

    is_sampling = False

    def velocity(self, *args: Any) -> Tensor:
        self.is_sampling = True
        found = super().velocity(*args)
        self.is_sampling = False
        return found

    def picture(self, *args: Any, **kwargs: Any) -> Block:  # toys: the experts of image rows
        block = super().picture(*args, **kwargs)
        return block._replace(places=block.places.clamp_min(0)) if self.is_sampling else block

    def _packer(self) -> Packer:  # Bagel: the embedding of another mark
        config = self.config
        if self.is_sampling:
            config = replace(config, start_of_image=config.end_of_image)
        return Packer(config=config, device=self.device)


class Faulty:
    """Velocities are 1 % too large."""

    def velocity(self, *args: Any) -> Tensor:
        return super().velocity(*args) * 1.01


class Appending:
    """The image being denoised stays in the cache."""

    def velocity(self, cache: Any, latents: Tensor, sigma: Tensor, grid: Grid) -> Tensor:
        found = super().velocity(cache, latents, sigma, grid)
        self.extend(cache, [ImageSegment(latent=x, grid=grid, is_context=True) for x in latents])
        return found


class WritesInactive:
    """Finished rows go on."""

    def next_logits(self, cache: Any, tokens: Any, active: Tensor) -> Tensor:
        return super().next_logits(cache, tokens, torch.ones_like(active))


class Stale:
    """extend forgets the last row, which keeps what it had."""

    is_reading = False

    def prefill(self, contexts: Any) -> Any:
        self.is_reading = True  # Bagel's prefill goes through extend
        cache = super().prefill(contexts)
        self.is_reading = False
        return cache

    def extend(self, cache: Any, segments: Sequence[Any]) -> None:
        unseen: Any = ImageSegment(latent=torch.zeros(1, self.latent_channels), grid=(1, 1))
        if self.image_policy != "flow":
            unseen = TokenImageSegment(tokens=torch.zeros(1, dtype=torch.long), grid=(1, 1))
        super().extend(cache, segments if self.is_reading else [*segments[:-1], unseen])


FLOWS = [
    ToyFlow,
    pytest.param(RandomDigits, marks=pytest.mark.slow),
    TinyBagel,
]


def broken(fault: type, base: type, **attributes: Any) -> Report:
    adapter = type(fault.__name__ + base.__name__, (fault, base), attributes)()
    return checked(adapter, rounds=(2,))


@pytest.mark.parametrize("base", FLOWS)
@pytest.mark.parametrize("fault", [ShiftedImage, WrongMarks, Faulty])
def test_a_wrong_image_block_is_a_wrong_velocity(fault: type, base: type) -> None:
    report = broken(fault, base)
    assert report.failed_names == {"velocities"}, str(report)


@pytest.mark.parametrize("base", [*FLOWS, ToyTokens, ToyMasked])
def test_a_wrong_position_is_a_wrong_log_prob(base: type) -> None:
    failed = broken(Shifted, base).failed_names
    assert failed >= {"text_log_probs", "ragged_texts", "extend_after_decoding"}
    assert not failed & {"extend_equals_prefill", "inactive_rows", "velocity_keeps_cache"}


@pytest.mark.parametrize(
    ("fault", "name", "base"),
    [
        (Appending, "velocity_keeps_cache", ToyFlow),
        (Appending, "velocity_keeps_cache", TinyBagel),
        (WritesInactive, "inactive_rows", ToyFlow),
        (WritesInactive, "inactive_rows", ToyTokens),
        (WritesInactive, "inactive_rows", TinyBagel),
        (Stale, "extend_equals_prefill", ToyFlow),
        (Stale, "extend_equals_prefill", ToyTokens),
        (Stale, "extend_equals_prefill", TinyBagel),
        pytest.param(Appending, "velocity_keeps_cache", RandomDigits, marks=pytest.mark.slow),
        pytest.param(WritesInactive, "inactive_rows", RandomDigits, marks=pytest.mark.slow),
        pytest.param(Stale, "extend_equals_prefill", RandomDigits, marks=pytest.mark.slow),
    ],
)
def test_the_first_failure_names_the_fault(fault: type, name: str, base: type) -> None:
    report = broken(fault, base)
    assert report.failed[0].name == name, str(report)


# ---- and every other check finds something, too


def changed(base: type, **attributes: Any) -> Callable[[], Any]:
    """Return a toy with replaced members."""
    return lambda: type("Broken" + base.__name__, (base,), attributes)()


def with_net(change: Callable[[Any], Any], base: type = ToyFlow) -> Callable[[], Any]:
    """Return a toy after a change."""

    def build() -> Any:
        adapter = base()
        change(adapter)
        return adapter

    return build


def scaled(scores: Scores, factor: float) -> Scores:
    return replace(scores, velocity=[v * factor for v in scores.velocity])


def noisy_prefill(self: Any, contexts: Any) -> Any:
    cache = ToyFlow.prefill(self, contexts)
    cache.values = [v + 0.1 * torch.randn_like(v) for v in cache.values]
    return cache


def counting_velocity(self: Any, *args: Any) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return ToyFlow.velocity(self, *args) * (1 + 0.01 * (self.calls % 2))


class LeakyRows(Rows):
    """Later rows are seen by earlier ones."""

    def visible(self) -> Tensor:
        return (self.block >= 0).unsqueeze(1) | super().visible()


def leaky_pack(self: Any, *args: Any) -> Rows:
    return LeakyRows(**vars(ToyFlow.pack(self, *args)))


def padded_pack(self: Any, *args: Any) -> Rows:
    rows = ToyFlow.pack(self, *args)
    return replace(rows, block=rows.block.clamp_min(0))


def unhidden_pack(self: Any, *args: Any) -> Rows:
    rows = ToyFlow.pack(self, *args)
    return replace(rows, hidden=torch.zeros_like(rows.hidden))


def last_state_read(self: Any, segment: Any, steps: slice) -> list[Block]:
    """Each copy holds the state behind its own: what the network is to lead to."""
    if segment.states is not None:
        states = torch.cat([segment.states[1:], segment.states[-1:]])
        segment = replace(segment, states=states)
    return ToyFlow.image_blocks(self, segment, steps)


def without_clean(self: Any, segment: Any, steps: slice) -> list[Block]:
    """Drawn images are scored, and forgotten."""
    found = ToyFlow.image_blocks(self, segment, steps)
    return [block for block in found if block.hidden or not segment.is_sampled]


def clean_before_noisy(self: Any, segment: Any, steps: slice) -> list[Block]:
    return ToyFlow.image_blocks(self, segment, steps)[::-1]


def hidden_codes(self: Any, segment: Any, steps: slice) -> list[Block]:
    return [block._replace(hidden=True) for block in ToyTokens.image_blocks(self, segment, steps)]


def centred_forward(self: Any, *args: Any) -> Scores:
    """Trajectories that are packed together meet in a mean."""
    scores = ToyFlow.forward(self, *args)
    mean = torch.cat([v.flatten() for v in scores.velocity]).mean()
    return replace(scores, velocity=[v - mean for v in scores.velocity])


def mixed_forward(
    self: Any, trajectories: Sequence[Trajectory], steps: slice = slice(None)
) -> Scores:
    return scaled(ToyFlow.forward(self, trajectories, steps), 1 + 0.01 * len(trajectories))


def sliced_forward(
    self: Any, trajectories: Sequence[Trajectory], steps: slice = slice(None)
) -> Scores:
    return scaled(ToyFlow.forward(self, trajectories, steps), 1.0 if steps == slice(None) else 1.01)


def training_forward(self: Any, *args: Any) -> Scores:
    return scaled(ToyFlow.forward(self, *args), 1.01 if self.training else 1.0)


def checkpointed_forward(self: Any, *args: Any) -> Scores:
    scores = ToyFlow.forward(self, *args)
    if self.net.gradient_checkpointing:
        scores.velocity = [v.detach() for v in scores.velocity]
    return scores


def double_forward(self: Any, *args: Any) -> Scores:
    scores = ToyFlow.forward(self, *args)
    return replace(scores, velocity=[v.double() for v in scores.velocity])


def blind_to_kind(
    self: Any, trajectories: Sequence[Trajectory], steps: slice = slice(None)
) -> Scores:
    given = sum(not s.is_sampled for t in trajectories for s in t.segments)
    return scaled(
        ToyFlow.forward(self, trajectories, steps), 1 + 0.01 * (given > len(trajectories))
    )


def partial_forward(self: Any, *args: Any) -> Scores:
    scores = ToyFlow.forward(self, *args)
    return replace(scores, text=[x.detach() * 1.0 for x in scores.text])


def untempered_forward(
    self: Any, trajectories: Sequence[Trajectory], steps: slice = slice(None)
) -> Scores:
    cold = [
        replace(
            t,
            segments=[
                replace(x, temperature=1.0) if isinstance(x, TextSegment) else x for x in t.segments
            ],
        )
        for t in trajectories
    ]
    return ToyFlow.forward(self, cold, steps)


def is_turn(segment: Any) -> bool:
    return isinstance(segment, TextSegment) and not segment.is_sampled and bool(segment.words)


def unclosed_turn(self: Any, segment: Any, steps: slice = slice(None)) -> list[Block]:
    """The packed pass forgets the mark behind what the user says."""
    found = ToyFlow.blocks(self, segment, steps)
    is_packed = steps == slice(None)
    return [b.first(len(b.words) - 1) for b in found] if is_packed and is_turn(segment) else found


def turns_first(
    self: Any, trajectories: Sequence[Trajectory], steps: slice = slice(None)
) -> Scores:
    """All that is given stands before all that is drawn, as if there were one round."""
    moved = [
        replace(t, segments=sorted(t.segments, key=lambda segment: segment.is_sampled))
        for t in trajectories
    ]
    return ToyFlow.forward(self, moved, steps)


def never_closed(self: Any, cache: Any, segments: Sequence[Any]) -> None:
    cache.open = torch.zeros_like(cache.open)
    type(self).__mro__[1].extend(self, cache, segments)


def shared_select(self: Any, rows: Tensor) -> Any:
    if torch.equal(rows, torch.arange(len(self))):
        return self
    return ToyCache.select(self, rows)


class SharingCache(ToyCache):
    select = shared_select


def sharing_prefill(self: Any, contexts: Any) -> Any:
    cache = ToyFlow.prefill(self, contexts)
    cache.__class__ = SharingCache
    return cache


@contextmanager
def lasting(adapter: Any) -> Iterator[None]:
    with torch.no_grad():
        adapter.net.head.bias += torch.arange(len(adapter.net.head.bias))
    yield


def blind_velocity(self: Any, cache: Any, *args: Any) -> Tensor:
    return ToyFlow.velocity(self, self.prefill([[]] * len(cache)), *args)


def shifted_code(self: Any, cache: Any, tokens: Tensor, step: int, grid: Grid) -> Any:
    found = ToyTokens.next_image_logits(self, cache, tokens, step, grid)
    return found.roll(1, -1) if step else found


def by_columns(self: Any, cache: Any, tokens: Tensor, where: Tensor, grid: Grid) -> Any:
    every = torch.ones_like(where)
    found = ToyMasked.masked_logits(self, cache, tokens, every, grid).unflatten(0, where.shape)
    return found.transpose(0, 1)[where.T]


def remembering(self: Any, cache: Any, *args: Any) -> Any:
    cache.positions = cache.positions + 1
    return ToyMasked.masked_logits(self, cache, *args)


def unrevealed_blocks(self: Any, segment: Any, steps: slice) -> list[Block]:
    found = ToyMasked.image_blocks(self, segment, steps)
    masked = self.codes(torch.full_like(segment.tokens, -1), segment.grid, hidden=True)
    return [masked if block.hidden else block for block in found]


def forgets_a_weight(adapter: Any) -> None:
    """Leave a weight out of what is saved, as a checkpoint of a wrapped net may."""
    adapter.net.register_state_dict_post_hook(lambda net, state, *_: state.__delitem__("head.bias"))
    adapter.net.register_load_state_dict_post_hook(lambda net, keys: keys.missing_keys.clear())


def detached_bagel() -> TinyBagel:
    adapter = TinyBagel()
    adapter.detach_context = True
    return adapter


def by_beginning(self: Any) -> dict[str, list[nn.Parameter]]:
    """Sort weights by how their names begin, which FSDP changes."""
    groups: dict[str, list[nn.Parameter]] = {"text": [], "flow": []}
    for name, parameter in self.net.named_parameters():
        groups["flow" if name.startswith("image") else "text"].append(parameter)
    return groups


def busy_idle(self: Any) -> None:
    """Keep step, but leave a trace."""
    ToyFlow.idle(self)
    self.net.head.bias += 1


FAULTS: list[tuple[str, Callable[[], Any]]] = [
    ("weights_under_net", with_net(lambda a: setattr(a, "more", nn.Linear(1, 1)))),
    ("param_groups", changed(ToyFlow, param_groups=lambda s: {"text": [], "flow": []})),
    ("param_groups", changed(ToyFlow, param_groups=by_beginning)),
    ("no_dropout", with_net(lambda a: setattr(a.net, "drop", nn.Dropout(0.1)))),
    ("modules_in_their_place", changed(ToyFlow, frozen_modules=lambda s: [s.net.layers[0]])),
    ("repeatable", changed(ToyFlow, prefill=noisy_prefill)),
    ("repeatable", changed(ToyFlow, velocity=counting_velocity)),
    ("idle", changed(ToyFlow, idle=lambda s: None)),
    ("idle", changed(ToyFlow, idle=lambda s: [ToyFlow.idle(s) for _ in range(2)])),
    ("idle", changed(ToyFlow, idle=busy_idle)),
    ("state_dict_round_trip", with_net(forgets_a_weight)),
    ("words", changed(ToyFlow, detokenize=lambda s, tokens: str(tokens.tolist()))),
    ("decode", changed(ToyFlow, decode=lambda s, *args: 2 * ToyFlow.decode(s, *args))),
    ("ragged_rows", changed(ToyFlow, pack=padded_pack)),
    ("select_and_expand", changed(ToyFlow, prefill=sharing_prefill)),
    ("extend_after_decoding", changed(ToyFlow, extend=never_closed)),
    ("extend_after_drawing", changed(ToyTokens, extend=never_closed)),
    ("rollouts_run", changed(ToyFlow, decode=lambda s, x, grid: x / 0)),
    ("scores_shapes", changed(ToyFlow, forward=double_forward)),
    ("text_log_probs", changed(ToyFlow, forward=untempered_forward)),
    ("text_log_probs", changed(ToyFlow, blocks=unclosed_turn)),
    ("causality", changed(ToyFlow, forward=turns_first)),
    ("later_rounds", changed(ToyFlow, forward=turns_first)),
    ("image_log_probs", changed(ToyTokens, next_image_logits=shifted_code)),
    ("image_log_probs", changed(ToyMasked, image_blocks=unrevealed_blocks)),
    ("masked_where", changed(ToyMasked, masked_logits=by_columns)),
    ("velocity_keeps_cache", changed(ToyMasked, masked_logits=remembering)),
    ("ode_at_eta_0", changed(ToyFlow, velocity=counting_velocity)),
    ("batch_invariance", changed(ToyFlow, forward=mixed_forward)),
    ("slices_of_steps", changed(ToyFlow, forward=sliced_forward)),
    ("causality", changed(ToyFlow, pack=leaky_pack)),
    ("later_rounds", changed(ToyFlow, pack=leaky_pack)),
    ("later_rounds", changed(ToyTokens, pack=leaky_pack)),
    ("later_rounds", changed(ToyMasked, pack=leaky_pack)),
    ("noisy_copies", changed(ToyFlow, pack=unhidden_pack)),
    ("noisy_copies", changed(ToyFlow, image_blocks=last_state_read)),
    ("noisy_copies", changed(ToyFlow, forward=centred_forward)),
    ("clean_image", changed(ToyFlow, image_blocks=without_clean)),
    ("clean_image", changed(ToyFlow, image_blocks=clean_before_noisy)),
    ("clean_image", changed(ToyTokens, image_blocks=hidden_codes)),
    ("given_equals_sampled", changed(ToyFlow, forward=blind_to_kind)),
    ("train_mode", changed(ToyFlow, forward=training_forward)),
    ("gradient_checkpointing", changed(ToyFlow, forward=checkpointed_forward)),
    ("gradients", changed(ToyFlow, forward=partial_forward)),
    ("unreached", changed(ToyFlow, unreached=lambda s, plan: [])),
    ("unreached", changed(ToyFlow, unreached=lambda s, plan: s.param_groups()["flow"])),
    ("image_sees_text", changed(ToyFlow, velocity=blind_velocity)),
    ("image_loss_reaches_text", detached_bagel),
    ("reference_is_undone", changed(ToyFlow, reference=lasting)),
]
ELSEWHERE = {
    "velocities",
    "ragged_texts",
    "inactive_rows",
    "velocity_keeps_cache",
    "extend_equals_prefill",
}
"""Found above."""


@pytest.mark.parametrize(("name", "build"), FAULTS)
def test_each_check_finds_its_fault(name: str, build: Callable[[], Any]) -> None:
    report = checked(build(), rounds=(2,), only=[name])
    assert report.failed_names == {name}
    assert "Error" not in report.failed[0].detail  # measured, not stumbled upon


def test_every_check_is_shown_to_fail() -> None:
    assert {name for name, _ in FAULTS} | ELSEWHERE == {check.name for check in CHECKS}
