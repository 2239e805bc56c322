"""JanusFlow: one Llama that speaks and draws with a rectified flow."""

from lightning_unigrpo.adapters.janusflow.adapter import JanusFlowAdapter, load_janusflow
from lightning_unigrpo.adapters.janusflow.config import JanusFlowConfig
from lightning_unigrpo.adapters.janusflow.network import JanusFlowNet

__all__ = ["JanusFlowAdapter", "JanusFlowConfig", "JanusFlowNet", "load_janusflow"]
