# What `import lightning_unigrpo` offers; each name is imported when it is first used.

from .adapter import Adapter, Cache, token_log_probs
from .callbacks import (
    IterationCheckpoint,
    PredictionWriter,
    ReferenceVelocity,
    RewardLogger,
    RolloutGrouping,
    RolloutProgress,
    RunReport,
    UniGRPOCallback,
)
from .checkpoint import latest_checkpoint
from .config import Guard, Objective, Optim, Sampling
from .data import PromptDataModule
from .guard import OnPolicyError
from .module import UniGRPOModule
from .reward import Reward
from .types import (
    ImageSegment,
    Prompt,
    Scores,
    TextSegment,
    TokenImageSegment,
    Trajectory,
)

__version__: str

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
