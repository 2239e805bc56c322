"""Show-o2: a Qwen2.5 that speaks, and a flow stack behind it that draws."""

from lightning_unigrpo.adapters.showo2.adapter import ShowO2Adapter, load_showo2
from lightning_unigrpo.adapters.showo2.config import ShowO2Config
from lightning_unigrpo.adapters.showo2.network import ShowO2Net

__all__ = ["ShowO2Adapter", "ShowO2Config", "ShowO2Net", "load_showo2"]
