"""Show-o through the contract: upstream's numbers, both layouts of words, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_unigrpo.adapter import token_log_probs
from lightning_unigrpo.adapters.showo import LoRA, ShowOAdapter, ShowONet, packing
from lightning_unigrpo.config import Optim, Sampling
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import Prompt, TextSegment, TokenImageSegment, Trajectory
from tests.test_showo2_golden import Ids
from tests.test_showo_golden import ATOL, CASES, CONFIG, FILE, FOLDER, GUIDED_ATOL

GRID = (6, 6)
PROMPTS = [
    Prompt(text="5 6 7", id=0),
    Prompt(text="9", id=1),
    Prompt(text="20 21 22 23 24", id=2),
]


class Tiny(ShowOAdapter):
    """The golden network; codes are shown as grey levels."""

    def decode(self, latents: Tensor, grid: Any) -> Tensor:
        return (latents.float() / CONFIG.codebook_size).view(-1, 1, *grid).expand(-1, 3, -1, -1)


def build(**settings: Any) -> Tiny:
    net = ShowONet(CONFIG)
    net.load_state_dict(load_file(FOLDER / "state_dict.safetensors"))
    room = {"max_prompt_tokens": FILE["max_seq_length"]}
    return Tiny(CONFIG, Ids(), net=net, **room | settings).eval()


@pytest.fixture(scope="module")
def adapter() -> Tiny:
    return build()


def words_of(ids: Tensor) -> list[int]:
    """Return what an image of upstream's row ``[L]`` is drawn behind, padding left out."""
    row: list[int] = ids.tolist()
    return row[row.count(CONFIG.pad) : row.index(CONFIG.begin_image)]


def codes_of(ids: Tensor) -> Tensor:
    """Return the codes ``[B, N]`` of upstream's rows, -1 where masked."""
    found = ids[:, -1 - CONFIG.num_vq_tokens : -1]
    return torch.where(found == CONFIG.mask_id, -1, found - CONFIG.code_offset)


def contexts(ids: Tensor) -> list[list[TextSegment]]:
    """Return contexts whose words are those of upstream's rows; bos and eos are no words."""
    words = [words_of(row)[2:-1] for row in ids]
    return [[TextSegment(tokens=torch.tensor([CONFIG.bos, *each]))] for each in words]


def trajectory(image: TokenImageSegment, *words: int) -> Trajectory:
    text = TextSegment(tokens=torch.tensor([CONFIG.bos, *words]))
    return Trajectory(prompt=PROMPTS[0], segments=[text, image], group=0, member=0)


# ---- upstream's numbers


def test_forward_through_the_cache(adapter: Tiny) -> None:
    """Words are tokenised again into upstream's prefix; logits of all codes, known or masked."""
    ids = CASES["v1_forward.input_ids"]
    cache, codes = adapter.prefill(contexts(ids)), codes_of(ids)
    assert [p.tolist() for p in adapter.image_prefix(cache)] == [words_of(row) for row in ids]
    assert torch.equal(codes < 0, CASES["v1_forward.masked"].bool())
    every = torch.ones_like(codes, dtype=torch.bool)
    logits = adapter.masked_logits(cache, codes, every, GRID)
    found = token_log_probs(logits, CASES["v1_forward.codes"].flatten())[0].view_as(codes)
    expected = CASES["v1_forward.image_logprobs_of_codes"]
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_forward_in_a_packed_pass(adapter: Tiny) -> None:
    """The masked codes are those of one step; both rows in one pass."""
    ids, masked = CASES["v1_forward.input_ids"], CASES["v1_forward.masked"].bool()
    rows = []
    for row, codes, where in zip(ids, CASES["v1_forward.codes"], masked, strict=True):
        image = TokenImageSegment(tokens=codes, grid=GRID, step=where.long(), window=(1, 2))
        image.log_prob = torch.zeros(int(where.sum()))
        rows.append(trajectory(image, *words_of(row)[2:-1]))
    found = torch.cat(adapter(rows).image_tokens)
    expected = CASES["v1_forward.image_logprobs_of_codes"][masked]
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_guidance(adapter: Tiny) -> None:
    """Upstream's scale s is 1 + s here; the empty prompt is an empty context."""
    ids = CASES["v1_cfg.input_ids"]
    given = contexts(ids[:2])
    cache, without = adapter.prefill(given), adapter.guidance(given)
    assert [p.tolist() for p in adapter.image_prefix(without)] == [words_of(r) for r in ids[2:]]
    codes = codes_of(ids[:2])
    every = torch.ones_like(codes, dtype=torch.bool)
    scale = 1 + FILE["guidance_scale"]
    found = adapter.guided_masked_logits(cache, without, codes, every, GRID, scale=scale)
    expected = CASES["v1_cfg.image_logits"].flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=GUIDED_ATOL, rtol=0)


def upstreams_run() -> tuple[Tensor, Tensor]:
    """Return the step ``[B, N]`` that each code of upstream's sampling run was kept in, and the codes."""
    remasked = CASES["v1_sampling.remasked"].bool()
    remasked[-1] = False  # nominally one is masked again, but it is returned
    return remasked.long().sum(0), CASES["v1_sampling.final_codes"]


def test_a_sampling_run_is_replayed(adapter: Tiny) -> None:
    """State by state, and log-probabilities of the codes of each step: cached, packed, and by windows."""
    ids, log_probs = CASES["v1_sampling.input_ids"], CASES["v1_sampling.step_logprobs"]
    steps, codes = upstreams_run()
    images = [
        TokenImageSegment(tokens=c, grid=GRID, step=s) for c, s in zip(codes, steps, strict=True)
    ]
    cache = adapter.prefill(contexts(ids))
    states = [image.masked_states() for image in images]
    for k, upstream in enumerate(CASES["v1_sampling.step_inputs"]):
        seen = torch.stack([row[k][0] for row in states])
        assert torch.equal(seen, codes_of(upstream))
        where = steps == k
        logits = adapter.masked_logits(cache, seen, where, GRID)
        found = token_log_probs(logits, codes[where])[0]
        torch.testing.assert_close(found, log_probs[k][where], atol=ATOL, rtol=0)
    for window in (None, (0, 2), (3, 6)):
        rows = [replace(image, window=window) for image in images]
        for row in rows:
            row.log_prob = torch.zeros(len(row.scored))
        given = [trajectory(r, *words_of(i)[2:-1]) for r, i in zip(rows, ids, strict=True)]
        low, high = window or (0, 6)
        for b, found in enumerate(adapter(given).image_tokens):
            expected = torch.cat([log_probs[k, b, steps[b] == k] for k in range(low, high)])
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


# ---- the contract


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({}, (1, 2)),
        ({"gradient_checkpointing": True}, (1, 2)),
        ({"lora": LoRA(rank=2)}, (1, 2)),
        pytest.param({}, (3,), marks=pytest.mark.slow),
    ],
)
def test_contract(settings: dict[str, Any], rounds: tuple[int, ...]) -> None:
    tiny = build(**settings, max_prompt_tokens=48)
    check_adapter(tiny, prompts=PROMPTS, rounds=rounds)


def drawn(adapter: Tiny, **settings: Any) -> list[Trajectory]:
    sampling = Sampling(max_text_tokens=5, num_timesteps=6, schedule="steps", seed=0, **settings)
    starts = [Start(prompt, i, m) for i, prompt in enumerate(PROMPTS) for m in range(2)]
    return [t for chunk in rollout(adapter, starts, sampling) for t in chunk]


def test_words_are_tokenised_once_and_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Request and reasoning, without marks, in one piece; learning goes by what was recorded."""
    adapter = build(request="8 {prompt}", max_prompt_tokens=16)
    trajectories = drawn(adapter)
    for t in trajectories:
        given, text, image = t.segments
        assert isinstance(given, TextSegment)
        assert isinstance(text, TextSegment)
        assert isinstance(image, TokenImageSegment)
        said = [i for i in text.tokens.tolist() if i != CONFIG.eos]
        request = [8, *map(int, t.prompt.text.split())]
        assert given.tokens.tolist() == [CONFIG.bos, *request]
        assert image.prefix is not None
        assert image.prefix.tolist() == [CONFIG.task, CONFIG.bos, *request, *said, CONFIG.eos]

    def refuse(*_: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(
        adapter, "tokenizer", type("No", (), {"encode": refuse, "decode": refuse})()
    )
    for found, t in zip(adapter(trajectories).image_tokens, trajectories, strict=True):
        torch.testing.assert_close(found, t.segments[-1].log_prob, atol=1e-5, rtol=0)  # type: ignore[union-attr]


def test_the_image_is_scored_behind_recorded_words_alone(adapter: Tiny) -> None:
    """Other words in the context change nothing, other recorded words do: the two sequences are apart."""
    t = drawn(adapter)[0]
    given, text, image = t.segments
    other = replace(given, tokens=given.tokens.flip(0))  # type: ignore[union-attr]
    whole = adapter([t]).image_tokens[0]
    found = adapter([replace(t, segments=[other, text, image])]).image_tokens[0]
    assert torch.equal(found, whole)
    moved = replace(image, prefix=image.prefix.flip(0))  # type: ignore[union-attr]
    found = adapter([replace(t, segments=[given, text, moved])]).image_tokens[0]
    assert not torch.allclose(found, whole, atol=1e-3)


def test_no_gradient_of_the_image_reaches_the_reasoning(adapter: Tiny) -> None:
    """Words of the reasoning that the recorded ones lack get none of it; recorded ones do."""
    t = drawn(adapter)[0]
    given, text, image = t.segments
    replaced = replace(text, tokens=torch.full_like(text.tokens, 60))  # type: ignore[union-attr]
    adapter.net.zero_grad()
    scores = adapter([replace(t, segments=[given, replaced, image])])
    sum(x.sum() for x in scores.image_tokens).backward()  # type: ignore[union-attr]
    found = adapter.decoder.embed_tokens.weight.grad
    assert 60 not in image.prefix  # type: ignore[operator,union-attr]
    assert not found[60].any()
    assert found[image.prefix[-2]].any()  # type: ignore[union-attr]
    adapter.net.zero_grad()


def test_a_drawn_image_is_seen_by_later_words_alone(adapter: Tiny) -> None:
    """Other codes of the first image change the second reasoning, not what the second image says."""
    roomy = build(max_prompt_tokens=24)
    t = drawn(roomy, plan=("text", "image", "text", "image"), window_size=4)[0]
    given, text, image, later, last = t.segments
    assert isinstance(image, TokenImageSegment)
    other = replace(image, tokens=image.tokens.flip(0))
    whole = roomy([t])
    found = roomy([replace(t, segments=[given, text, other, later, last])])
    assert not torch.allclose(found.text[1], whole.text[1], atol=1e-3)
    assert torch.equal(found.image_tokens[1], whole.image_tokens[1])
    lines = [CONFIG.task, CONFIG.bos, *map(int, PROMPTS[0].text.split())]
    assert last.prefix.tolist()[: len(lines)] == lines  # type: ignore[union-attr]


def test_shared_words_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers from fewer rows, where reasonings are equal."""
    rows = {}
    finish = packing.Packer.finish

    def watch(self: Any) -> Any:
        pack, layout = finish(self)
        rows[self.share] = len(pack)
        return pack, layout

    monkeypatch.setattr(packing.Packer, "finish", watch)
    t = drawn(build())[0]
    found = [build(share_prefixes=share)([t, t]) for share in (True, False)]
    for one, other in zip(found[0].image_tokens, found[1].image_tokens, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    prefix = len(t.segments[-1].prefix)  # type: ignore[union-attr,arg-type]
    said = len(t.segments[0].tokens) + sum(i != CONFIG.eos for i in t.segments[1].tokens)  # type: ignore[union-attr]
    assert rows[False] - rows[True] == prefix + said


# ---- what is refused


def test_words_that_do_not_fit_are_an_error_and_never_cut(adapter: Tiny) -> None:
    """Before anything is drawn, for each prompt; and where a reasoning tokenised again turned out longer."""
    settings = Sampling(max_text_tokens=6)
    adapter.require_room(Prompt(text="1 2 3 4"), settings)
    with pytest.raises(ValueError, match=r"takes 5 tokens, so 5 of adapter\.max_prompt_tokens 12"):
        adapter.require_room(Prompt(text="1 2 3 4 5"), settings)
    adapter.require_room(Prompt(text="1 2 3 4 5"), replace(settings, plan=("text",)))
    two = replace(settings, max_text_tokens=3, plan=("text", "image", "text"))
    adapter.require_room(Prompt(text="1 2 3 4 5 6"), two)  # no image is behind the second text
    with pytest.raises(ValueError, match=r"allow 6: lower model\.sampling\.max_text_tokens"):
        adapter.require_room(Prompt(text="1 2 3 4 5"), replace(two, plan=(*two.plan, "image")))
    with pytest.raises(
        ValueError,
        match=r"are 13 tokens, .* but adapter\.max_prompt_tokens is 12",
    ):
        adapter.prefix([[*range(1, 12)]])
    assert len(adapter.prefix([[*range(1, 11)]])) == 13


def test_a_data_set_is_looked_through_before_anything_is_drawn() -> None:
    """The last prompt is too long: no rollout begins."""
    from lightning.pytorch import Trainer

    class Never(Tiny):
        def prefill(self, contexts: Any) -> Any:
            raise AssertionError("drawn")

    tiny = Never(CONFIG, Ids(), max_prompt_tokens=12)
    module = UniGRPOModule(
        tiny,
        rewards=[lambda images, **_: [0.0] * len(images)],
        sampling=Sampling(max_text_tokens=6),
    )
    prompts = [*PROMPTS[:2], Prompt(text="1 2 3 4 5", id=3)]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_steps=1,
    )
    data = PromptDataModule.from_prompts(prompts, prompts_per_iteration=2)
    with pytest.raises(ValueError, match="Prompt '1 2 3 4 5' takes 5 tokens"):
        trainer.fit(module, data)


def test_a_group_without_weights_is_named_when_the_other_is_frozen() -> None:
    """Everything is in the text group: a rate of 0 there leaves nothing."""
    from lightning.pytorch import Trainer

    module = UniGRPOModule(
        build(max_prompt_tokens=20),
        prompts=PROMPTS[:1],
        rewards=[lambda images, **_: [0.0] * len(images)],
        sampling=Sampling(max_text_tokens=6),
        optim=Optim(text_lr=0.0, flow_lr=1e-3),
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_steps=1,
    )
    with pytest.raises(ValueError, match=r"'flow': 0.*text_lr 0\.0 and flow_lr 0\.001"):
        trainer.fit(module)


def test_what_the_layout_has_no_place_for(adapter: Tiny) -> None:
    with pytest.raises(ValueError, match="2 input images"):
        adapter.tokenize(Prompt(text="5", images=(torch.zeros(3, 8, 8),) * 2))
    with pytest.raises(ValueError, match=r"adapter\.request is 'draw'"):
        build(request="draw")
    with pytest.raises(ValueError, match=r"draws \(96, 96\) only"):
        adapter.image_grid(Prompt(text="5", size=(64, 96)))
    with pytest.raises(TypeError, match="has no velocity: its image_policy is 'masked'"):
        adapter.velocity(adapter.prefill([[]]), torch.zeros(1, 36, 1), torch.ones(1), GRID)
    with pytest.raises(ValueError, match=r"adapter\.lora\.projections"):
        LoRA(projections=("o_proj",))
    with pytest.raises(ValueError, match=r"adapter\.lora\.rank is 0"):
        LoRA(rank=0)
