"""A run that dies loses nothing: what goes on gives the same numbers, and nothing torn is ever loaded."""

from __future__ import annotations

import json
import random
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lightning_unigrpo.checkpoint.files as files
from benchmarks.reliability import PATIENCE, measure
from lightning_unigrpo import IterationCheckpoint, UniGRPOModule, latest_checkpoint
from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.callbacks.checkpoint import lost_a_rank
from lightning_unigrpo.checkpoint import (
    LAST,
    MANIFEST,
    consolidate,
    fault,
    find_whole,
    get_states,
    keep_copy,
    part_of,
    publish,
    set_states,
)
from lightning_unigrpo.cli import main
from lightning_unigrpo.distributed import RankLostError
from tests.ranks import Ranks
from tests.resume_cases import (
    DRAWS,
    FOLDERS,
    LAYOUTS,
    Terminate,
    diary_of,
    differences,
    ema,
    fit,
    predict,
    read_diary,
    saving,
    trainer,
)
from tests.test_configs import CONFIGS
from tests.toys import ToyFlow

CPU = torch.device("cpu")
SHARED = [layout for layout in LAYOUTS if layout != "single"]


# ---- one process


@pytest.mark.parametrize("steps", [2, 3])
def test_a_run_in_two_parts_is_the_run_in_one(steps: int, tmp_path: Path) -> None:
    """At the end of a pass over the prompts (2) and inside one (3); a reward draws from all generators."""
    fit(tmp_path, "single", "whole", 5)
    fit(tmp_path, "single", "part", steps, saving(tmp_path, "kept"))
    fit(tmp_path, "single", "part", 5, ckpt_path=tmp_path / "kept" / LAST, seed=77)
    whole, part = (read_diary(diary_of(tmp_path, "single", run)) for run in ("whole", "part"))
    assert len(whole) == 5
    assert differences(whole, part) == []


def test_validation_in_between_changes_no_number_of_training(tmp_path: Path) -> None:
    """Its rewards draw as well; a run that goes on after it does not repeat that."""
    fit(tmp_path, "single", "without", 3)
    fit(tmp_path, "single", "with", 3, limit_val_batches=1, val_check_interval=1)
    without, with_it = (
        read_diary(diary_of(tmp_path, "single", run)) for run in ("without", "with")
    )
    assert differences(without, with_it) == []


def draws() -> list[float]:
    return [random.random(), float(np.random.random()), float(torch.rand(())), random.gauss(0, 1)]  # noqa: NPY002


def test_all_generators_continue_after_a_file_that_is_trusted_with_nothing(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves its second number for the next call
    np.random.standard_normal()  # noqa: NPY002 - likewise
    torch.save(get_states(CPU), tmp_path / "states")
    first = [*draws(), float(np.random.standard_normal())]  # noqa: NPY002
    set_states(torch.load(tmp_path / "states", weights_only=True), CPU)
    assert [*draws(), float(np.random.standard_normal())] == first  # noqa: NPY002


@pytest.mark.gpu
def test_a_gpus_generator_continues() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    states = get_states(device)
    first = torch.rand(4, device=device)
    assert not torch.equal(torch.rand(4, device=device), first)
    set_states(states, device)
    assert torch.equal(torch.rand(4, device=device), first)


# Lightning says this of every module with configure_model; nothing is sharded here.
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
def test_averaged_weights_continue(tmp_path: Path) -> None:
    fit(tmp_path, "single", "whole", 4, ema())
    fit(tmp_path, "single", "part", 2, ema(), saving(tmp_path, "kept"))
    fit(tmp_path, "single", "rest", 4, ema(), ckpt_path=tmp_path / "kept" / LAST, seed=77)
    compare_averages(tmp_path, "single", "whole", "rest")


def compare_averages(folder: Path, layout: str, *runs: str) -> None:
    whole, rest = (read_diary(diary_of(folder, layout, run, 0)) for run in runs)
    assert differences(whole[2:], rest) == []
    (average,), (other) = (read_diary(diary_of(folder, layout, run, 0), "ends") for run in runs)
    assert average["weights"] == other[-1]["weights"]
    assert average["weights"] != whole[-1]["weights"]  # it is the average, not the last weights


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_iteration_and_saves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "SIGTERM", number)  # what Terminate sends
    before = signal.getsignal(number)
    fit(tmp_path, "single", "part", 4, Terminate(0, 1), saving(tmp_path, "kept", 0))
    assert signal.getsignal(number) == before
    fit(tmp_path, "single", "part", 4, ckpt_path=tmp_path / "kept" / LAST, seed=77)
    fit(tmp_path, "single", "whole", 4)
    whole, part = (read_diary(diary_of(tmp_path, "single", run)) for run in ("whole", "part"))
    assert differences(whole, part) == []


def test_signals_are_the_users_again_after_an_error(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, "single", "part", 4, Fail(), saving(tmp_path, "kept"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


class Fail(Terminate):
    """Raises where the other sends a signal."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(0, 1)
        self.error = error or ZeroDivisionError()

    def on_phase(self, trainer: Any, module: UniGRPOModule, *_: Any) -> None:
        if module.iteration == self.iteration:
            raise self.error


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes of exceptions; before, it is logged")
def test_a_lost_rank_is_named_with_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    error = RuntimeError("[gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:5")
    saved = saving(tmp_path, "other", 0), saving(tmp_path, "kept")
    with pytest.raises(RuntimeError, match="Connection closed") as caught:
        fit(tmp_path, "single", "part", 4, Fail(error), *saved)
    assert caught.value is error
    (note,) = error.__notes__
    assert "Rank 0 of 1 does not reach another rank" in note
    assert f"of iteration 1 with ckpt_path={tmp_path / 'kept' / LAST}" in note


def test_only_what_comes_from_other_ranks_counts_as_a_lost_rank() -> None:
    assert lost_a_rank(torch.distributed.DistBackendError("NCCL error: remote process exited"))
    assert lost_a_rank(RuntimeError("Timed out waiting 20000ms for recv operation to complete"))
    assert not lost_a_rank(RuntimeError("the reward server timed out"))
    assert not lost_a_rank(ValueError("Connection closed by peer"))
    for cause, expected in (("Connection closed by peer", True), ("no ink left", False)):
        error = RankLostError("Rank 0 failed inside the network")
        error.__cause__ = RuntimeError(cause)
        assert lost_a_rank(error) == expected


# ---- on the disk


def content(path: Path) -> str:
    """Return what :func:`write` wrote, from a whole checkpoint."""
    assert fault(path) is None
    if path.is_dir():
        return (path / "part").read_text()
    return str(torch.load(path)["text"])


def write(path: Path, text: str, *, folder: bool) -> None:
    part = part_of(path)
    files.remove(part)
    if folder:
        part.mkdir()
        (part / "part").write_text(text)
        torch.save({}, part / "meta.pt")
    else:
        torch.save({"text": text}, part)


class Died(BaseException):
    """Stands for the end of the process."""


def dying(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the process end at the n-th of the steps that change names or bring things to the disk."""
    left = iter(range(steps))

    def mortal(do: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **settings: Any) -> Any:
            if next(left, None) is None:
                raise Died
            return do(*args, **settings)

        return step

    for owner, names in (
        (files, ("remove", "_sync", "_link")),
        (Path, ("rename", "replace", "write_text")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, mortal(getattr(owner, name)))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_a_whole_checkpoint_is_there_whenever_the_process_ends(
    old: bool, new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether files or folders replace files or folders, and wherever writing stops."""
    seen = set()
    for steps in range(30):
        path = tmp_path / str(steps) / LAST
        path.parent.mkdir()
        write(path, "old", folder=old)
        publish(path, {})
        write(path, "new", folder=new)
        with monkeypatch.context() as patch:
            dying(patch, steps)
            try:
                publish(path, {})
                keep_copy(path, path.with_name("iteration=2.ckpt"))
                done = True
            except Died:
                done = False
        found = find_whole(path)
        seen.add((found.name, content(found)))
        assert latest_checkpoint(path.parent) in (found, path.with_name("iteration=2.ckpt"))
        files.tidy(path.parent)  # the next start
        assert not part_of(path).exists()
        write(path, "next", folder=new)
        publish(path, {})
        assert content(path) == "next"
        assert sorted(p.name for p in path.parent.glob("last*")) == [LAST]
        if done:
            break
    assert done
    assert {(LAST, "old"), (LAST, "new")} <= seen
    assert ((f"{LAST}.old", "old") in seen) == (old or new)


@pytest.mark.parametrize("folder", [False, True])
def test_everything_is_on_the_disk_before_it_gets_its_name(
    folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / LAST, []
    write(path, "text", folder=folder)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, lambda *_, n=name: done.append(n))
    monkeypatch.setattr(files, "_sync", lambda each: done.append(each.name))
    publish(path, {})
    part = part_of(path).name
    if folder:
        assert done == ["meta.pt", "part", MANIFEST, part, "rename", tmp_path.name]
    else:
        assert done == [part, "replace", tmp_path.name]


def test_the_newest_whole_checkpoint_of_all_runs_is_found(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for number, version in enumerate(["version_0", "version_1"]):
        path = tmp_path / version / "checkpoints" / LAST
        path.parent.mkdir(parents=True)
        write(path, version, folder=bool(number))
        publish(path, {})
        keep_copy(path, path.with_name("iteration=2.ckpt"))
    newest = tmp_path / "version_1" / "checkpoints" / LAST
    assert latest_checkpoint(tmp_path) == newest
    (newest / "part").unlink()
    copy = newest.with_name("iteration=2.ckpt")
    assert latest_checkpoint(tmp_path) == copy
    assert content(copy) == "version_1"  # its files are links
    shutil.rmtree(copy)
    assert latest_checkpoint(tmp_path) == tmp_path / "version_0" / "checkpoints" / LAST


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_rank_that_writes_elsewhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / LAST
    write(path, "text", folder=True)
    torch.distributed.checkpoint.save(
        {"a": torch.ones(3)}, checkpoint_id=part_of(path), no_dist=True
    )
    next(part_of(path).glob("*.distcp")).unlink()
    with pytest.raises(RuntimeError, match=r"lacks __0_0\.distcp.*rank 0 sees another disk"):
        publish(path, {})


# ---- refused


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a checkpoint of the single process."""
    folder = tmp_path_factory.mktemp("kept")
    fit(folder, "single", "part", 1, saving(folder, "kept"))
    return folder / "kept" / LAST


def truncated(path: Path, to: Path, size: float) -> Path:
    to.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    return to


def as_folder(path: Path, to: Path) -> Path:
    """Return a folder that looks like one of FSDP2."""
    origin = torch.load(path)["unigrpo"] | {"strategy": "fsdp2"}
    write(to, "weights", folder=True)
    publish(to, origin)
    return to


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def with_less(folder: Path) -> Path:
    (folder / "part").write_text("weig")
    return folder


def saved(found: object, to: Path) -> Path:
    torch.save(found, to)
    return to


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "nothing there": (lambda path, to: to, "there is no such file or folder"),
    "empty": (lambda path, to: truncated(path, to, 0), "it is torn: 0 bytes"),
    "half": (lambda path, to: truncated(path, to, 0.5), "it is torn: .* the end is missing"),
    "almost all": (lambda path, to: truncated(path, to, 0.9999), "it is torn"),
    "not torch's": (
        lambda path, to: (to.write_text("a text"), to)[1],
        "not a file that torch.save wrote",
    ),
    "safetensors": (
        lambda path, to: (save_file({"a": torch.ones(1)}, to), to)[1],
        "not a file that torch.save wrote",
    ),
    "another program's": (
        lambda path, to: saved({"state_dict": {}}, to),
        "no run of UniGRPOModule wrote it",
    ),
    "code": (lambda path, to: saved({"unigrpo": CPU, "p": Path()}, to), "pathlib.*weights_only"),
    "no manifest": (
        lambda path, to: without(as_folder(path, to), MANIFEST),
        "has no manifest.json, which is written last.*unigrpo consolidate",
    ),
    "no checkpoint": (lambda path, to: (to.mkdir(), to)[1], "so no checkpoint"),
    "a file less": (
        lambda path, to: without(as_folder(path, to), "part"),
        r"it is torn: part \(missing\)",
    ),
    "a byte less": (
        lambda path, to: with_less(as_folder(path, to)),
        r"part \(4 of 7 bytes\)",
    ),
    "parts of ranks": (as_folder, "a part from each rank of ModelParallelStrategy.*single device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_torn_and_foreign_checkpoints_are_refused(name: str, kept: Path, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    (tmp_path / "run").mkdir()
    path = make(kept, tmp_path / "run" / LAST)
    with pytest.raises(ValueError, match=f"(?s){words}") as refused:
        fit(tmp_path, "single", "rest", 2, ckpt_path=path)
    text = str(refused.value)
    assert str(path) in text
    assert len(text.splitlines()) < 24
    assert not diary_of(tmp_path, "single", "rest").exists()  # nothing had begun


def test_a_refusal_names_a_whole_checkpoint_beside_it(kept: Path, tmp_path: Path) -> None:
    path = truncated(kept, tmp_path / LAST, 0.5)
    other = shutil.copy(kept, tmp_path / "iteration=1.ckpt")
    with pytest.raises(ValueError, match=rf"The newest whole one in that folder is {other}"):
        fit(tmp_path, "single", "rest", 2, ckpt_path=path)


def change(path: Path, to: Path, **settings: Any) -> Path:
    """Return the checkpoint with another origin."""
    found = torch.load(path)
    found["unigrpo"] = found["unigrpo"] | settings
    return saved(found, to)


def test_another_policy_is_refused(kept: Path, tmp_path: Path) -> None:
    other = change(kept, tmp_path / "a.ckpt", adapter="OtherAdapter")
    with pytest.raises(ValueError, match=r"adapter OtherAdapter, and model\.adapter is Digits"):
        fit(tmp_path, "single", "rest", 2, ckpt_path=other)
    module = UniGRPOModule(ToyFlow())
    with pytest.raises(ValueError, match=r"(?s)its network is another one:\n.*and \d+ more"):
        trainer("single", 1).fit(module, ckpt_path=kept)


def test_an_optimizer_of_other_weights_is_refused_and_predicting_is_not(
    kept: Path, tmp_path: Path
) -> None:
    names = torch.load(kept)["unigrpo"]["trained"]
    frozen = change(kept, tmp_path / "a.ckpt", trained=names[1:])
    with pytest.raises(ValueError, match=rf"{names[0]}: was frozen, is trained"):
        fit(tmp_path, "single", "rest", 2, ckpt_path=frozen)
    predict(tmp_path, "single", "predict", frozen)


def test_other_settings_are_told(kept: Path, tmp_path: Path) -> None:
    settings = torch.load(kept)["unigrpo"]["settings"]
    settings["sampling"] |= {"group_size": 16, "rows_per_chunk": 1}
    settings["optim"] |= {"text_lr": 1.0}
    other = change(kept, tmp_path / "a.ckpt", settings=settings)
    with pytest.warns(UserWarning, match="another run than the one that was interrupted") as told:
        fit(tmp_path, "single", "rest", 2, ckpt_path=other)
    text = str(told[0].message)
    assert "model.sampling.group_size: 16 -> 4\n" in text
    assert "model.optim.text_lr: 1.0 -> 0.0003 (the checkpoint's stays)" in text
    assert "rows_per_chunk" not in text  # changes no number


def test_the_one_before_is_loaded_when_the_last_was_never_put_in_place(
    kept: Path, tmp_path: Path
) -> None:
    shutil.copy(kept, tmp_path / f"{LAST}.old")
    with pytest.warns(UserWarning, match="ended between two renames.*of iteration 1"):
        fit(tmp_path, "single", "rest", 2, ckpt_path=tmp_path / LAST)
    (begins,) = read_diary(diary_of(tmp_path, "single", "rest"), "begins")
    assert begins["iteration"] == 1


def test_kept_checkpoints_and_left_overs(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "iteration=7.ckpt.part").write_text("half")
    keeping = IterationCheckpoint(every=1, dirpath=str(folder), keep=2)
    fit(tmp_path, "single", "part", 3, keeping)
    assert sorted(path.name for path in folder.iterdir()) == ["iteration=2.ckpt", LAST]
    assert torch.load(folder / "iteration=2.ckpt")["iteration"] == 2
    assert torch.load(folder / LAST)["iteration"] == 3


# ---- several ranks


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run two ranks as far as a checkpoint, and others from there on; a single rank as well."""
    folder = tmp_path_factory.mktemp("halves")
    fit(folder, "single", "quiet", 4, draws=False)
    fit(folder, "single", "quiet part", 2, saving(folder, "alone"), draws=False)
    run_all(Ranks("tests.resume_cases:first_half", 2, folder / "first", str(folder)))
    run_all(
        Ranks("tests.resume_cases:second_half", 2, folder / "second", str(folder)),
        Ranks("tests.resume_cases:alone", 1, folder / "third", str(folder)),
    )
    yield folder
    shutil.rmtree(folder)


def run_all(*groups: Ranks) -> None:
    for ranks in groups:
        codes = ranks.wait(400)
        assert set(codes) == {0}, f"exit codes {codes}\n{ranks.output()}"


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", SHARED)
def test_ranks_go_on_to_the_same_bits(layout: str, rank: int, halves: Path) -> None:
    """Losses, rewards, norms, rates and weights; a reference that was refreshed meanwhile."""
    whole, part, rest = (
        read_diary(diary_of(halves, layout, run, rank)) for run in ("whole", "part", "rest")
    )
    assert len(whole) == 4
    assert differences(whole, part + rest) == []


@pytest.mark.dist
@pytest.mark.slow
def test_averaged_weights_continue_under_ddp(halves: Path) -> None:
    compare_averages(halves, "ddp", "ema whole", "ema rest")


@pytest.mark.dist
@pytest.mark.slow
def test_the_command_line_ends_well_on_two_ranks(halves: Path) -> None:
    """The report's folder is asked for by all ranks, and one of them writes it."""
    (version,) = (halves / "cli" / "runs" / "digits").glob("version_*")
    assert (version / "report.json").stat().st_size > 0
    assert torch.load(version / "checkpoints" / LAST)["iteration"] == 1


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_at_a_boundary(halves: Path) -> None:
    assert torch.load(halves / "terminated" / LAST)["iteration"] == 2
    for rank in (0, 1):
        assert len(read_diary(diary_of(halves, "ddp", "terminated", rank))) == 2


CLOSE = ("reward", "reward/digit", "grad_norm/text", "grad_norm/flow", "flow/velocity_mse")


def compare_sizes(whole: Path, other: Path, begin: int) -> None:
    """Compare up to rounding: other ranks draw the rollouts, and gradients are added in another order."""
    expected, found = read_diary(whole)[begin:], read_diary(other)
    assert len(found) == len(expected) > 0
    for a, b in zip(expected, found, strict=True):
        for key in CLOSE:
            assert b["metrics"][key] == pytest.approx(a["metrics"][key], rel=1e-4, abs=1e-7), key
        assert a["rates"] == b["rates"]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", FOLDERS)
def test_parts_of_two_ranks_go_on_in_one(layout: str, halves: Path) -> None:
    compare_sizes(diary_of(halves, layout, "whole", 0), diary_of(halves, layout, "shrunk", 0), 3)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp full", "fsdp2 full"])
def test_a_file_of_one_process_goes_on_in_two(layout: str, halves: Path) -> None:
    """Under another strategy too, whose optimizer counts the weights in another order."""
    whole = diary_of(halves, "single", "quiet", 0)
    compare_sizes(whole, diary_of(halves, layout, "from alone", 0), 2)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", FOLDERS)
def test_parts_become_a_file_that_draws_the_same_images(
    layout: str, halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout not in DRAWS
    file = tmp_path / "whole.ckpt"
    if layout == "fsdp sharded":
        words = [str(halves / layout / LAST), "--output_file", str(file)]
        monkeypatch.setattr(sys, "argv", ["consolidate_checkpoint", *words])
        runpy.run_module("lightning.pytorch.utilities.consolidate_checkpoint", run_name="__main__")
    else:
        consolidate(halves / layout / LAST, file)
    predict(tmp_path, "single", "predict", file)
    found = torch.load(diary_of(tmp_path, "single", "predict").with_suffix(".pt"))
    parts = [torch.load(halves / f"{layout}-predict-{rank}.pt") for rank in (0, 1)]
    expected = parts[0] | parts[1]
    assert found.keys() == expected.keys()
    assert len(found) == 2
    base = DigitsAdapter()
    assert not torch.equal(
        torch.load(file)["state_dict"]["adapter.net.language_model.lm_head.weight"],
        base.net.state_dict()["language_model.lm_head.weight"],
    )
    for name, image in found.items():
        assert torch.equal(image, expected[name])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("layout", FOLDERS)
def test_parts_are_exported_as_the_whole_is(layout: str, halves: Path, tmp_path: Path) -> None:
    parts, file = halves / layout / LAST, tmp_path / "whole.ckpt"
    consolidate(parts, file)
    config = ["--config", str(CONFIGS / "digits.yaml")]
    for place, output in ((parts, "a"), (file, "b")):
        main(["export", *config, f"--ckpt_path={place}", f"--output={tmp_path / output}"])
    written = [load_file(tmp_path / output / "model.safetensors") for output in "ab"]
    state = torch.load(file, weights_only=True)["state_dict"]
    for name, value in written[0].items():
        assert torch.equal(value, written[1][name])
        assert torch.equal(value, state[f"adapter.net.{name}"].half())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "whole.ckpt"]


@pytest.mark.dist
@pytest.mark.slow
def test_killed_ranks_lose_nothing(tmp_path: Path) -> None:
    """The short form of benchmarks/reliability.py: a rank dies in a checkpoint, a rollout, an update."""
    outcome = measure("fsdp sharded", tmp_path, kills=3, stop=False)
    assert [kill.is_clear for kill in outcome.kills] == [True] * 3
    slowest = max(kill.survivor_s for kill in outcome.kills)
    assert slowest < 2 * PATIENCE  # a process may end slowly
    assert outcome.loads >= 1
    assert outcome.torn_loads == []
    assert outcome.differences == []
    manifest = json.loads((tmp_path / "checkpoints" / LAST / MANIFEST).read_text())
    assert manifest["iteration"] == outcome.iterations
