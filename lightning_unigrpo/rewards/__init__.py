"""Rewards ready to be named in a configuration, one file each."""

from lightning_unigrpo.rewards.aesthetic import AestheticScore
from lightning_unigrpo.rewards.clip import CLIPScore, PickScore
from lightning_unigrpo.rewards.format import ThinkFormat
from lightning_unigrpo.rewards.geneval import GenEval
from lightning_unigrpo.rewards.hps import HPSv2
from lightning_unigrpo.rewards.http import HTTPReward
from lightning_unigrpo.rewards.jpeg import JPEGCompressibility, JPEGIncompressibility
from lightning_unigrpo.rewards.judge import Judge
from lightning_unigrpo.rewards.length import SoftLength
from lightning_unigrpo.rewards.ocr import OCRReward
from lightning_unigrpo.rewards.pickled import PickledReward
from lightning_unigrpo.rewards.words import LengthBand, PromptCoverage, Repetition

__all__ = [
    "AestheticScore",
    "CLIPScore",
    "GenEval",
    "HPSv2",
    "HTTPReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "Judge",
    "LengthBand",
    "OCRReward",
    "PickScore",
    "PickledReward",
    "PromptCoverage",
    "Repetition",
    "SoftLength",
    "ThinkFormat",
]
