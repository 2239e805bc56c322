"""Backbones seen as policies, one folder per family; imported as ``lightning_unigrpo.adapters``."""
