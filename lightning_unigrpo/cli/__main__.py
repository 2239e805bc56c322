"""``python -m lightning_unigrpo.cli`` is ``unigrpo``."""

from lightning_unigrpo.cli import main

main()
