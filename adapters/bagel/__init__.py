"""Bagel: a Mixture-of-Transformers with an understanding and a generation expert."""

from lightning_unigrpo.adapters.bagel.adapter import BagelAdapter, load_bagel
from lightning_unigrpo.adapters.bagel.config import BagelConfig
from lightning_unigrpo.adapters.bagel.network import BagelNet

__all__ = ["BagelAdapter", "BagelConfig", "BagelNet", "load_bagel"]
