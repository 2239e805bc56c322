"""Janus-Pro: one Llama that reasons, and draws codes one after the other."""

from lightning_unigrpo.adapters.januspro.adapter import JanusProAdapter, load_januspro
from lightning_unigrpo.adapters.januspro.config import Marks
from lightning_unigrpo.adapters.januspro.network import JanusProNet

__all__ = ["JanusProAdapter", "JanusProNet", "Marks", "load_januspro"]
