"""FSDP's ways to shard, over four ranks: each trains as one process does, and holds what it should."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_unigrpo import PromptDataModule, UniGRPOModule
from lightning_unigrpo.adapters.digits import DigitsAdapter
from tests.ranks import CPUFSDPStrategy, run, trainer_of
from tests.test_module import Record

pytestmark = [pytest.mark.dist, pytest.mark.slow]
KINDS = {"FULL_SHARD": 4, "SHARD_GRAD_OP": 4, "HYBRID_SHARD": 2, "NO_SHARD": 1}
"""Parts that the weights are cut into."""


class Kind(CPUFSDPStrategy):
    """A way to shard; a hybrid one gets its groups when there are processes."""

    def __init__(self, kind: str) -> None:
        later = {"process_group": (None, None)} if kind == "HYBRID_SHARD" else {}
        super().__init__(sharding_strategy=kind, process_group_backend="gloo", **later)  # type: ignore[arg-type]

    def _settings(self) -> dict[str, Any]:
        if self.kwargs.get("process_group") == (None, None):
            inside = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
            across = [dist.new_group(pair) for pair in ([0, 2], [1, 3])]
            node, place = divmod(dist.get_rank(), 2)
            self.kwargs["process_group"] = (inside[node], across[place])
        return super()._settings()


class Climb(UniGRPOModule):
    """With SGD: AdamW turns a rounding of a gradient near zero into a step."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": p, "lr": 0.05, "name": n} for n, p in self._trainable().items()]
        optimizer = torch.optim.SGD(groups)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        }


def trained(strategy: Any) -> dict[str, Any]:
    """Return the metrics of three iterations, and how many weights are here."""
    adapter = DigitsAdapter()
    defaults = adapter.defaults()
    assert defaults.sampling is not None
    assert defaults.optim is not None
    module = Climb(
        adapter,
        sampling=replace(defaults.sampling, group_size=4),
        optim=replace(defaults.optim, micro_batch_size=3, ppo_epochs=2, max_grad_norm=0.5),
    )
    record = Record()
    trainer = trainer_of("single", 6, record, strategy=strategy)
    trainer.fit(module, PromptDataModule(prompts_per_iteration=4))
    size = sum(p.numel() for p in adapter.net.parameters())
    return {"metrics": record.metrics, "size": size}


def every_kind(folder: Path) -> None:
    """Train with each, and keep what the first rank saw."""
    found = {kind: trained(Kind(kind)) for kind in KINDS}
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


def test_every_kind_trains_as_one_process(tmp_path: Path) -> None:
    expected = trained("auto")
    run("tests.test_sharding_kinds:every_kind", 4, tmp_path)
    found = json.loads((tmp_path / "found.json").read_text())
    for kind, parts in KINDS.items():
        assert found[kind]["size"] == pytest.approx(expected["size"] / parts, rel=0.01), kind
        for one, other in zip(found[kind]["metrics"], expected["metrics"], strict=True):
            for key in ("reward", "loss", "grad_norm/text", "grad_norm/flow", "flow/velocity_mse"):
                # float32 sums over four ranks in another order, through six clipped steps
                assert one[key] == pytest.approx(other[key], rel=2e-4, abs=1e-7), (kind, key)
