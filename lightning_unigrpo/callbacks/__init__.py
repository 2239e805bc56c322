"""What happens around a collection: grouping, reference, rewards, checkpoints, display."""

from lightning_unigrpo.callbacks.base import Experience, UniGRPOCallback
from lightning_unigrpo.callbacks.checkpoint import IterationCheckpoint
from lightning_unigrpo.callbacks.drift import ReferenceDrift
from lightning_unigrpo.callbacks.export import SavePretrained
from lightning_unigrpo.callbacks.folder import EvaluationFolder
from lightning_unigrpo.callbacks.grouping import RolloutGrouping
from lightning_unigrpo.callbacks.predictions import PredictionWriter
from lightning_unigrpo.callbacks.progress import RolloutProgress
from lightning_unigrpo.callbacks.recorder import RolloutRecorder
from lightning_unigrpo.callbacks.reference import ReferenceVelocity
from lightning_unigrpo.callbacks.report import RunReport
from lightning_unigrpo.callbacks.rewards import RewardLogger

__all__ = [
    "EvaluationFolder",
    "Experience",
    "IterationCheckpoint",
    "PredictionWriter",
    "ReferenceDrift",
    "ReferenceVelocity",
    "RewardLogger",
    "RolloutGrouping",
    "RolloutProgress",
    "RolloutRecorder",
    "RunReport",
    "SavePretrained",
    "UniGRPOCallback",
]
