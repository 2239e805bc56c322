"""Ask whether the adapter keeps the contract: python examples/new_adapter/check.py"""

from tempfile import mkdtemp

from emu3 import Emu3Adapter
from tiny import write_release

from lightning_unigrpo.testing import check_adapter
from lightning_unigrpo.types import Prompt

if __name__ == "__main__":
    write_release(folder := mkdtemp())
    prompts = [Prompt(text="a red cube"), Prompt(text="two cats on a very long sofa")]
    print(check_adapter(Emu3Adapter(folder, size=(8, 8)), prompts, raise_on_failure=False))
