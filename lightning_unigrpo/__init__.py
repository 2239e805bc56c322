"""UniGRPO for existing unified models, as a PyTorch Lightning plugin.

The names are listed in ``__init__.pyi`` and imported when they are first used: torch and Lightning take
seconds, which ``unigrpo --help`` does not have.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
