"""Show-o, the first generation: one phi-1.5 that reasons, and unmasks the codes of an image."""

from lightning_unigrpo.adapters.showo.adapter import ShowOAdapter, load_showo
from lightning_unigrpo.adapters.showo.config import ShowOConfig
from lightning_unigrpo.adapters.showo.lora import LoRA
from lightning_unigrpo.adapters.showo.network import ShowONet

__all__ = ["LoRA", "ShowOAdapter", "ShowOConfig", "ShowONet", "load_showo"]
