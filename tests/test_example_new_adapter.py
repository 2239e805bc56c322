"""The adapter of docs/new_adapter.md: against transformers' own Emu3, and the page against real runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from transformers import Emu3ForConditionalGeneration

from lightning_unigrpo import Objective, Optim, PromptDataModule, Sampling, UniGRPOModule
from lightning_unigrpo.adapters.common.lora import LowRank
from lightning_unigrpo.cli.training import run
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import Prompt, TextSegment, Trajectory
from tests import ranks

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "new_adapter"
PAGE = (ROOT / "docs" / "new_adapter.md").read_text()
PROMPTS = [Prompt(text="a red cube"), Prompt(text="two cats on a very long sofa", id=1)]


@pytest.fixture(scope="module", autouse=True)
def example() -> Iterator[None]:
    """Let the files of the example import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for name in ("emu3", "emu3_changed", "tiny", "train"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("release")
    importlib.import_module("tiny").write_release(folder)
    return str(folder)


@pytest.fixture(scope="module")
def theirs(release: str) -> Any:
    return Emu3ForConditionalGeneration.from_pretrained(release).eval()


def build(release: str, **settings: Any) -> Any:
    return importlib.import_module("emu3").Emu3Adapter(release, size=(8, 12), **settings)


# ---- the contract


@pytest.mark.parametrize("lora", [None, LowRank(rank=2)], ids=["full", "lora"])
def test_contract(release: str, lora: LowRank | None) -> None:
    report = check_adapter(build(release, lora=lora), PROMPTS, rounds=(1, 2, 3))
    of_others = {"velocity_keeps_cache", "masked_where", "ode_at_eta_0", "velocities"}
    of_others |= {"slices_of_steps", "noisy_copies", "gradient_checkpointing"}
    of_others |= {"reference_is_undone"} if lora is None else set()
    assert {result.name for result in report.results if result.value is None} == of_others


def test_the_adapter_is_short() -> None:
    assert len((FOLDER / "emu3.py").read_text().splitlines()) <= 250


def test_what_is_never_drawn_may_be_minus_infinity(
    release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides of a comparison then hold -inf, which is no disagreement; NaN is one, and is named."""
    adapter = build(release)
    never = torch.arange(adapter.net.config.text_config.vocab_size) > adapter.stop_token
    monkeypatch.setattr(adapter, "words", lambda x: x.float().masked_fill(never, -torch.inf))
    check_adapter(adapter, PROMPTS)
    monkeypatch.setattr(adapter, "words", lambda x: x.float().masked_fill(never, torch.nan))
    report = check_adapter(adapter, PROMPTS, only={"ragged_rows"}, raise_on_failure=False)
    assert "not finite" in report.failed[0].detail


def test_dropout_that_is_a_number_is_found(release: str) -> None:
    adapter = build(release)
    adapter.net.model.text_model.layers[1].self_attn.attention_dropout = 0.1
    report = check_adapter(adapter, PROMPTS, only={"no_dropout"}, raise_on_failure=False)
    name = "model.text_model.layers.1.self_attn.attention_dropout = 0.1"
    assert [result.detail for result in report.results] == [name]


@pytest.mark.parametrize(
    ("prompt", "say"),
    [
        (Prompt(text="a", images=(torch.zeros(3, 8, 8),)), "reads no pictures"),
        (Prompt(text="a", size=(7, 8)), "multiples of 2"),
    ],
)
def test_what_it_cannot_do_is_refused(release: str, prompt: Prompt, say: str) -> None:
    adapter = build(release)
    with pytest.raises(ValueError, match=say):
        adapter.tokenize(prompt), adapter.image_grid(prompt)


# ---- against transformers


def drawn(adapter: Any, *plan: str) -> list[Trajectory]:
    sampling = Sampling(plan=plan, max_text_tokens=6, seed=0)  # type: ignore[arg-type]
    starts = [Start(prompt, prompt.id, 0) for prompt in PROMPTS]
    return next(rollout(adapter.eval(), starts, sampling))


class Written:
    """A trajectory as ids, put together from upstream's marks and the model's own table of codes."""

    def __init__(self, theirs: Any, words: Any, trajectory: Trajectory) -> None:
        self.words, self.table = words, theirs.vocabulary_mapping
        request = f"You are a helpful assistant. USER: {trajectory.prompt.text}"
        self.ids: list[int] = words.encode(f"<|extra_203|>{request}")
        self.texts: list[Tensor] = []
        """Places of sampled words."""
        self.images: list[Tensor] = []
        """Places of sampled codes."""
        for segment in trajectory.segments[1:]:
            if isinstance(segment, TextSegment):
                self.ids += words.encode(" ASSISTANT:")
                self.texts.append(torch.arange(len(segment.tokens)) + len(self.ids))
                self.ids += segment.tokens.tolist()
                self.ids += [] if segment.stopped else words.encode("<|extra_204|>")
            else:
                h, w = segment.grid
                self.ids += words.encode(f"<|image start|>{h}*{w}<|image token|>")
                lines = self.table.convert_img2bpe(segment.tokens.view(h, w)).flatten()
                is_code = torch.isin(lines, torch.tensor(self.table.image_tokens))
                self.images.append(is_code.nonzero().squeeze(1) + len(self.ids))
                self.ids += [*lines.tolist(), *words.encode("<|extra_201|><|image end|>")]


@torch.no_grad()
def test_scores_are_those_of_transformers(release: str, theirs: Any) -> None:
    """One forward of the untouched model, then a softmax over words, or over codes; 1e-5: float32."""
    adapter = build(release)
    trajectories = drawn(adapter, "text", "image", "text", "image")
    scores = adapter(trajectories)
    texts, images = iter(scores.text), iter(scores.image_tokens)
    stop = adapter.tokenizer.eos_token_id
    for trajectory in trajectories:
        written = Written(theirs, adapter.tokenizer, trajectory)
        ids = torch.tensor(written.ids)
        logits = theirs(ids.unsqueeze(0)).logits[0]

        def expected(places: Tensor, allowed: list[int], ids=ids, logits=logits) -> Tensor:  # type: ignore[no-untyped-def]
            log_p = logits[places - 1][:, allowed].log_softmax(1)
            return log_p.gather(1, ids[places].unsqueeze(1) - allowed[0]).squeeze(1)

        for places in written.texts:
            found = expected(places, list(range(stop + 1)))
            torch.testing.assert_close(next(texts), found, atol=1e-5, rtol=0)
        for places in written.images:
            found = expected(places, theirs.vocabulary_mapping.image_tokens)
            torch.testing.assert_close(next(images), found, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pictures_are_those_of_transformers(release: str, theirs: Any) -> None:
    """decode_image_tokens reads ids with their marks; its pixels are in [-1, 1] or a little beyond."""
    adapter = build(release)
    trajectories = drawn(adapter, "text", "image")
    h, w = trajectories[0].segments[-1].grid  # type: ignore[union-attr]
    rows = [Written(theirs, adapter.tokenizer, t).ids[-(h * (w + 1) + 2) :] for t in trajectories]
    ids = torch.tensor([[*row, 0] for row in rows])  # it drops three at the end
    pixels = theirs.decode_image_tokens(image_tokens=ids, height=h, width=w)
    found = torch.stack([t.image for t in trajectories])  # type: ignore[misc]
    assert found.shape == (2, 3, 8, 12)
    torch.testing.assert_close(found, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_codes_are_drawn_as_transformers_generates(release: str, theirs: Any) -> None:
    """Always the likeliest: transformers' generate, held to codes and ends of lines, draws the same."""
    adapter = build(release).eval()
    prompt = PROMPTS[0]
    cache = adapter.prefill([adapter.tokenize(prompt)])
    h, w = adapter.image_grid(prompt)
    codes = torch.full((1, h * w), -1)
    for step in range(h * w):
        codes[0, step] = adapter.next_image_logits(cache, codes, step, (h, w)).argmax(1)
    request = f"<|extra_203|>You are a helpful assistant. USER: {prompt.text}"
    head = adapter.tokenizer(f"{request}<|image start|>{h}*{w}<|image token|>", return_tensors="pt")
    table = theirs.vocabulary_mapping
    begin = head["input_ids"].shape[1]

    def allowed(_: int, ids: Tensor) -> list[int]:
        at_end = (len(ids) - begin) % (w + 1) == w
        return [table.eol_token_id] if at_end else table.image_tokens

    ids = theirs.generate(
        **head,
        max_new_tokens=h * (w + 1),
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        eos_token_id=None,
    )
    lines = ids[:, begin:].view(1, h, w + 1)
    assert torch.equal(codes.view(1, h, w), table.convert_bpe2img(lines).long())


# ---- training


def weights(folder: Path | str) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.slow
def test_its_pictures_turn_red(release: str) -> None:
    """Random weights draw at a redness of 0.01; the guard stopped nothing in 40 iterations."""
    metrics = importlib.import_module("train").train(release, 40).trainer.callback_metrics
    assert metrics["reward"] > 0.04
    assert metrics["guard/log_prob"] < 1e-5
    assert metrics["loss"].isfinite()


def test_what_is_trained_is_saved_and_read_again(release: str, tmp_path: Path) -> None:
    """In transformers' layout: all weights moved but the VQ-VAE's, and the scores are the trained ones."""
    adapter = importlib.import_module("train").train(release, 2).adapter
    adapter.save_pretrained(tmp_path)
    before, after = weights(release), weights(tmp_path)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if not name.startswith("vqmodel.")}
    trajectories = drawn(adapter, "text", "image")
    again = build(str(tmp_path))(trajectories)
    assert all(map(torch.equal, adapter(trajectories).image_tokens, again.image_tokens))


@pytest.mark.slow
def test_command_line_with_lora(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped configuration, smaller; the factors are merged into what is written."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red cube\ntwo cats\n")
    run(
        [
            "fit",
            f"--config={FOLDER / 'emu3.yaml'}",
            f"--model.adapter.source={release}",
            "--model.adapter.dtype=float32",
            "--model.adapter.size=[8,8]",
            "--model.adapter.lora.rank=2",
            "--model.sampling.max_text_tokens=6",
            "--model.objective.truncation_reward=null",
            "--model.optim.text_lr=1e-2",
            "--data.train=prompts.txt",
            "--data.prompts_per_iteration=2",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=2",
            "--trainer.precision=32-true",
            "--trainer.logger=false",
            "--trainer.enable_model_summary=false",
        ]
    )
    before, after = weights(release), weights("trained")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if re.search(r"layers\.\d\..*_proj", name)}


def on_ranks(folder: Path, release: str, name: str, mode: str) -> None:
    """Train on the ranks of this process group and write the weights."""
    sys.path.insert(0, str(FOLDER))
    module = UniGRPOModule(
        build(release),
        rewards=[importlib.import_module("train").redness],
        sampling=Sampling(group_size=4, max_text_tokens=6, rollout_weights=mode, seed=0),  # type: ignore[arg-type]
        objective=Objective(truncation_reward=None),
        optim=Optim(text_lr=1e-3, ppo_epochs=1),
    )
    data = PromptDataModule.from_prompts(PROMPTS, prompts_per_iteration=2)
    ranks.trainer_of(name, 2).fit(module, data)
    module.adapter.save_pretrained(folder / "trained")  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_as_one(release: str, tmp_path: Path) -> None:
    """With sharded weights, unit by unit in rollouts too; AdamW turns roundings into 1e-6 of a step."""
    for name, size, mode in (("single", 1, "auto"), ("fsdp", 2, "sharded")):
        ranks.run(
            "tests.test_example_new_adapter:on_ranks", size, tmp_path / name, release, name, mode
        )
    alone, cut = (weights(tmp_path / name / "trained") for name in ("single", "fsdp"))
    assert alone.keys() == cut.keys()
    for name, value in alone.items():
        torch.testing.assert_close(cut[name], value, atol=2e-6, rtol=0, msg=name)


# ---- the page


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_code_on_the_page_is_code_that_runs() -> None:
    source = "\n".join(path.read_text() for path in sorted(FOLDER.glob("*.py")))
    found = blocks("python")
    assert len(found) > 8
    for block in found:
        assert block in source or indent(dedent(block), "    ") in source, block
    assert blocks("yaml") == [(FOLDER / "emu3.yaml").read_text()]
    assert yaml.safe_load(blocks("yaml")[0])["model"]["adapter"]["class_path"] == "emu3.Emu3Adapter"


def plain(report: str) -> list[str]:
    """Return lines without what differs between machines: numbers, places in files, spaces."""
    lines = [re.sub(r"\d+(\.\d+)?(e[+-]\d+)?|nan", "#", line) for line in report.splitlines()]
    return [" ".join(line.split()) for line in lines]


def changed(release: str, folder: Path, change: Callable[[str], str]) -> Any:
    """Build the adapter from a changed source file of the same name."""
    path = folder / "emu3.py"
    path.write_text(change((FOLDER / "emu3.py").read_text()))
    spec = importlib.util.spec_from_file_location("emu3_changed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["emu3_changed"] = module
    spec.loader.exec_module(module)
    return module.Emu3Adapter(release, size=(8, 8))


class Unwritten(ast.NodeTransformer):
    """Take methods away, as they are before somebody writes them."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if node.name in self.names and node.name == "idle":  # the contract has one
            return None
        if node.name in self.names:
            node.body = ast.parse(f'raise NotImplementedError("{node.name}")').body
        return node

    def __call__(self, source: str) -> str:
        return ast.unparse(self.visit(ast.parse(source)))


STEPS = [
    ("prefill", "next_logits", "next_image_logits", "extend", "forward", "idle"),
    ("extend", "forward", "idle"),
    ("forward", "idle"),
    ("idle",),
    (),
]
"""What is not written yet, step by step."""


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_reports_on_the_page_are_real(release: str, tmp_path: Path, step: int) -> None:
    adapter = changed(release, tmp_path, Unwritten(*STEPS[step]))
    report = str(check_adapter(adapter, PROMPTS, raise_on_failure=False))
    shown = [block for block in blocks("text") if block.startswith("Emu3Adapter:")][step]
    assert shown.splitlines()[0] == report.splitlines()[0]
    real = plain(report)
    assert [line for line in plain(shown) if line not in real] in ([], ["..."])


MISTAKES = {
    "`attention_dropout`": (
        "attention_dropout = 0.0",
        "attention_dropout = 0.1",
        {"no_dropout", "train_mode"},
    ),
    "stays in `net`": ("        del self.net.model.vqmodel\n", "", {"modules_in_their_place"}),
    "in train mode": ("vqmodel.requires_grad_(False)", "vqmodel.train()", {"decode"}),
    "in [-1, 1]": ("(pixels.float() / 2 + 0.5).clamp(0, 1)", "pixels.float()", {"decode"}),
    "as a word": ("decode(tokens[tokens != self.stop_token])", "decode(tokens)", {"words"}),
    "rows that wait": (
        "ids if is_on else ids[:0]",
        "ids",
        {"inactive_rows", "extend_after_decoding"},
    ),
    "positions count slots": (
        "(cache.seen.cumsum(1) - 1).clamp_min(0)",
        "torch.arange(cache.seen.shape[1]).expand(len(cache), -1)",
        {"inactive_rows", "extend_equals_prefill", "extend_after_decoding"},
    ),
    "the whole segment again": (
        "[ids[n:] for ids, n in",
        "[ids for ids, n in",
        {"extend_after_decoding", "extend_after_drawing", "image_log_probs"},
    ),
    "at the id itself": (
        "at = 0 ",
        "at = 1 ",
        {"text_log_probs", "ragged_texts", "image_log_probs"},
    ),
    "temperature is forgotten": (
        "temperature=segment.temperature",
        "temperature=1.0",
        {"text_log_probs", "image_log_probs"},
    ),
    "without gradients": (
        "    def forward(",
        "    @torch.no_grad()\n    def forward(",
        {"gradients", "unreached", "image_loss_reaches_text"},
    ),
}
"""Mistakes by words of their row on the page: what is replaced, by what, and the checks that fail."""


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_fail_the_checks_that_the_page_names(
    release: str, tmp_path: Path, words: str
) -> None:
    right, wrong, names = MISTAKES[words]
    [row] = [line for line in PAGE.splitlines() if line.startswith("| ") and words in line]
    assert set(re.findall(r"`(\w+)`", row.split("|")[2])) == names
    assert (FOLDER / "emu3.py").read_text().count(right) == 1
    adapter = changed(release, tmp_path, lambda source: source.replace(right, wrong))
    report = check_adapter(adapter, PROMPTS, only=names, raise_on_failure=False)
    assert report.failed_names == names
