"""UniGRPO for existing unified models, as a PyTorch Lightning plugin."""

from lightning_unigrpo.adapter import Adapter, Cache, token_log_probs
from lightning_unigrpo.callbacks import (
    IterationCheckpoint,
    PredictionWriter,
    ReferenceVelocity,
    RewardLogger,
    RolloutGrouping,
    RolloutProgress,
    RunReport,
    UniGRPOCallback,
)
from lightning_unigrpo.checkpoint import latest_checkpoint
from lightning_unigrpo.config import Guard, Objective, Optim, Sampling
from lightning_unigrpo.data import PromptDataModule
from lightning_unigrpo.guard import OnPolicyError
from lightning_unigrpo.module import UniGRPOModule
from lightning_unigrpo.reward import Reward
from lightning_unigrpo.types import (
    ImageSegment,
    Prompt,
    Scores,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Cache",
    "Guard",
    "ImageSegment",
    "IterationCheckpoint",
    "Objective",
    "OnPolicyError",
    "Optim",
    "PredictionWriter",
    "Prompt",
    "PromptDataModule",
    "ReferenceVelocity",
    "Reward",
    "RewardLogger",
    "RolloutGrouping",
    "RolloutProgress",
    "RunReport",
    "Sampling",
    "Scores",
    "TextSegment",
    "TokenImageSegment",
    "Trajectory",
    "UniGRPOCallback",
    "UniGRPOModule",
    "latest_checkpoint",
    "token_log_probs",
]
