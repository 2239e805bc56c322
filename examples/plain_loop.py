"""UniGRPO without Lightning: the whole algorithm as one loop over adapter, rollout and loss.

python examples/plain_loop.py --iterations 60
"""

from __future__ import annotations

import argparse
import copy

import torch

from lightning_unigrpo.adapters.digits import DigitsAdapter
from lightning_unigrpo.advantage import group_advantages
from lightning_unigrpo.loss import count, trajectory_loss
from lightning_unigrpo.rollout import Start, rollout
from lightning_unigrpo.types import ImageSegment, sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=16)
    args = parser.parse_args()

    adapter = DigitsAdapter()
    reference = copy.deepcopy(adapter).requires_grad_(False).eval()
    defaults = adapter.defaults()
    sampling, objective = defaults.sampling, defaults.objective
    [reward] = defaults.rewards[:1]
    optimizer = torch.optim.AdamW(
        [
            {"params": group, "lr": getattr(defaults.optim, f"{name}_lr")}
            for name, group in adapter.param_groups().items()
        ],
        weight_decay=0.0,
    )
    generator = torch.Generator().manual_seed(0)
    for iteration in range(args.iterations):
        picked = torch.randperm(len(defaults.train), generator=generator)[: args.prompts]
        starts = [
            Start(defaults.train[i], group, member)
            for group, i in enumerate(picked.tolist())
            for member in range(sampling.group_size)
        ]
        adapter.eval()
        trajectories = [
            t for chunk in rollout(adapter, starts, sampling, iteration=iteration) for t in chunk
        ]
        scores = reward(
            images=torch.stack([t.image for t in trajectories]),
            answer=[t.prompt.columns["answer"] for t in trajectories],
        )
        rewards = torch.as_tensor(scores) * torch.tensor([float(t.stopped) for t in trajectories])
        advantages, _ = group_advantages(rewards, torch.tensor([t.group for t in trajectories]))
        with torch.no_grad():
            velocities = iter(reference(trajectories).velocity)
        for trajectory, advantage in zip(trajectories, advantages.tolist(), strict=True):
            for _, segment in sampled([trajectory]):
                segment.advantage = advantage
                if isinstance(segment, ImageSegment):
                    segment.ref_velocity = next(velocities)
        adapter.train()
        loss, _ = trajectory_loss(
            adapter(trajectories),
            trajectories,
            objective=objective,
            sampling=sampling,
            counts=count(trajectories, sampling),
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.net.parameters(), 1.0)
        optimizer.step()
        print(f"iteration {iteration + 1}  reward {float(rewards.mean()):.3f}")


if __name__ == "__main__":
    main()
