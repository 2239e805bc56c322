"""``unigrpo serve-reward --config serve.yaml``: a reward behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import jsonargparse

from lightning_unigrpo import serve


def run(arguments: Sequence[str]) -> None:
    """Run ``unigrpo serve-reward``: the arguments of :func:`lightning_unigrpo.serve.build`, flat."""
    parser = jsonargparse.ArgumentParser(prog="unigrpo serve-reward", exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(serve.build, skip={"limits"}, sub_configs=True)
    limits = parser.add_class_arguments(serve.Limits)
    known = parser.instantiate(parser.parse_args(arguments)).as_dict()
    known.pop("config")
    settings = serve.Limits(**{name: known.pop(name) for name in limits})
    serve.run(serve.build(**known, limits=settings))
