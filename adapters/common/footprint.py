"""What attention of a packed pass gathers where it runs block by block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Gathered:
    """Counts what a layer holds beyond :data:`~attention.DENSE_LIMIT`, block by block of one trajectory."""

    context: int = 0
    """Rows so far that later blocks see."""
    keys: int = 0
    """Rows whose keys and values are held: of each block what it sees, and itself."""
    masks: int = 0
    """Entries of masks: each causal block has its own."""

    def seen(self, rows: int, *, causal: bool = True) -> None:
        """Add a block that later ones see."""
        self.hidden(rows, causal=causal)
        self.context += rows

    def hidden(self, rows: int, *, copies: int = 1, causal: bool = False) -> None:
        """Add blocks side by side that nothing else sees."""
        if rows:
            self.keys += copies * (self.context + rows)
            self.masks += copies * rows * (self.context + rows) * causal
