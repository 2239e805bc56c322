"""Train a tiny Emu3 on a CPU until its pictures turn red: python examples/new_adapter/train.py"""

from tempfile import mkdtemp

from emu3 import Emu3Adapter
from lightning.pytorch import Trainer
from tiny import write_release
from torch import Tensor

from lightning_unigrpo import Objective, Optim, Prompt, PromptDataModule, Sampling, UniGRPOModule


def redness(*, images: Tensor, **_: object) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


def train(source: str, updates: int) -> UniGRPOModule:
    prompts = [Prompt(text=text, id=i) for i, text in enumerate(("a red cube", "two cats"))]
    module = UniGRPOModule(
        Emu3Adapter(source, size=(8, 8)),
        rewards=[redness],
        sampling=Sampling(group_size=8, max_text_tokens=6, seed=0),
        objective=Objective(truncation_reward=None),  # random weights hardly ever stop
        optim=Optim(text_lr=1e-2, ppo_epochs=1),
    )
    trainer = Trainer(
        max_steps=updates, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module, PromptDataModule.from_prompts(prompts, prompts_per_iteration=2))
    return module


if __name__ == "__main__":
    write_release(folder := mkdtemp())
    print("redness", float(train(folder, 40).trainer.callback_metrics["reward"]))
