"""What one sequence contributes to a step of the engine: the contract between the scheduler and the forward pass."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Part:
    """Some tokens of one sequence that are read now, after what its blocks hold already."""

    ids: list[int]
    """the tokens to read, one or more"""
    start: int
    """the position of the first of them: as many of the sequence's tokens are in the cache"""
    blocks: list[int]
    """its block table; the blocks cover `start + len(ids)` tokens"""
    wanted: int = 1
    """how many of the last `ids` need logits: 0 within a prompt, 1 for the next token, more to check drafts"""
    adapter: str = ""
    """the name of the LoRA adapter that reads them"""

    @property
    def end(self) -> int:
        """Tokens of the sequence in the cache after the step."""
        return self.start + len(self.ids)
