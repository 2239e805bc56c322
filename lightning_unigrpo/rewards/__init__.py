"""Rewards ready to be named in a configuration, one file each."""

from lightning_unigrpo.rewards.format import ThinkFormat
from lightning_unigrpo.rewards.length import SoftLength

__all__ = ["SoftLength", "ThinkFormat"]
