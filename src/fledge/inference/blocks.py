"""The keys and values of all sequences in blocks of equal size, shared by reference (Kwon et al., vLLM, 2023).

A `Table` says which blocks hold one sequence; the `BlockPool` counts who refers to a block. A full block is known by
a digest of all tokens up to its end, so that a prompt which begins like another finds its keys and values already
there; when nobody refers to such a block any more it stays as long as room is not needed, the longest unused going
first. What is in a block is no concern of this module: it holds no tensor.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import blake2b


class BlockPool:
    """Blocks 0 … size - 1: free (nothing worth keeping), cached (content, nobody reads it) or used (referred to)."""

    def __init__(self, size: int, block_tokens: int, caching: bool = True) -> None:
        """`size`: the most blocks there may be; without `caching` no content outlives its sequence."""
        self.size, self.block_tokens, self.caching = size, block_tokens, caching
        self.reach = 0
        """blocks handed out so far: the tensors have to hold blocks 0 … reach - 1"""
        self.era = 0
        """how often everything was forgotten: contents of an earlier era are of no use to others"""
        self.unclean: list[int] = []
        """blocks taken that may hold NaN from before: to be made zero before they are written"""
        self._references: list[int] = []  # by block
        self._digests: list[bytes | None] = []  # by block: what it is known by
        self._sound: list[bool] = []  # by block: what was written since it was taken gave numbers
        self._known: dict[bytes, int] = {}
        self._idle: dict[int, None] = {}  # cached blocks, the longest unused first
        self._free: list[int] = []

    @property
    def available(self) -> int:
        """Blocks that can be taken: free ones and cached ones."""
        return self.size - self.used

    @property
    def used(self) -> int:
        """Blocks that some sequence refers to."""
        return self.reach - len(self._free) - len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that nobody refers to and whose content is kept for whoever may come."""
        return len(self._idle)

    def fixed(self, block: int) -> bool:
        """Whether a block must not be written: others read it, or are promised what is in it."""
        return self._references[block] > 1 or self._digests[block] is not None

    def take(self) -> int:
        """A block of nobody's, with one reference. Gives up the longest unused content only when nothing is free."""
        if self._free:
            block = self._free.pop()
        elif self.reach < self.size:
            block = self.reach
            self.reach += 1
            self._references.append(0)
            self._digests.append(None)
            self._sound.append(True)  # new tensors are zero
        else:
            block = next(iter(self._idle))
            del self._idle[block]
            digest, self._digests[block] = self._digests[block], None
            if digest is not None:
                del self._known[digest]
        if not self._sound[block]:
            self.unclean.append(block)
        self._references[block], self._sound[block] = 1, False
        return block

    def share(self, block: int) -> None:
        """One reference more to a block that is used or cached."""
        self._idle.pop(block, None)
        self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each. Name a sequence's last block first: it is the first to be given up."""
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._digests[block] is None:
                    self._free.append(block)
                else:
                    self._idle[block] = None

    def seal(self, block: int, digest: bytes) -> None:
        """A used block is full: from now on it is found by its digest and never written again."""
        if self.caching and self._digests[block] is None and digest not in self._known:
            self._digests[block] = digest
            self._known[digest] = block

    def find(self, digest: bytes) -> int | None:
        """The block that holds what this digest stands for."""
        return self._known.get(digest)

    def judge(self, blocks: Iterable[int], sound: bool) -> None:
        """Whether logits that came from these blocks were numbers."""
        for block in blocks:
            self._sound[block] = sound

    def idle(self, block: int) -> bool:
        """Whether a block is cached, so that sharing it leaves one less to take."""
        return block in self._idle

    def forget(self) -> None:
        """No content is found any more (the weights have changed); whoever reads a block keeps it."""
        self.era += 1
        self._known.clear()
        self._digests = [None] * self.reach
        self._free.extend(self._idle)
        self._idle.clear()


class Table:
    """The blocks of one sequence, in order, and how many of its tokens they hold."""

    def __init__(self, pool: BlockPool, ids: list[int], adapter: str = "", key: str = "") -> None:
        """`ids`: the sequence itself (it may grow); `adapter`: the name of what reads it; `key`: what makes the same
        tokens other content (as another adapter does)."""
        self.pool, self.ids, self.adapter, self.key = pool, ids, adapter, key
        self.blocks: list[int] = []
        self.held = 0
        """tokens of the sequence whose keys and values are in the blocks"""
        self._sealed = 0  # full blocks that the pool knows about
        self._judged = 0  # tokens whose blocks were found sound
        self._digests: list[bytes] = []
        self._era = pool.era

    def digest(self, place: int) -> bytes:
        """What full block `place` is known by: all tokens up to its end, and the key."""
        size = self.pool.block_tokens
        while len(self._digests) <= place:
            begin = len(self._digests) * size
            parent = self._digests[-1] if self._digests else blake2b(self.key.encode(), digest_size=16).digest()
            tokens = array("q", self.ids[begin : begin + size]).tobytes()
            self._digests.append(blake2b(tokens, digest_size=16, key=parent).digest())
        return self._digests[place]

    def matches(self) -> list[int]:
        """The cached blocks with which the sequence begins; at least its last token is left to be read."""
        found: list[int] = []
        for place in range((len(self.ids) - 1) // self.pool.block_tokens):
            block = self.pool.find(self.digest(place))
            if block is None:
                break
            found.append(block)
        return found

    def begin(self, matches: list[int]) -> None:
        """Start with these cached blocks."""
        for block in matches:
            self.pool.share(block)
        self.blocks = list(matches)
        self.held = len(matches) * self.pool.block_tokens
        self._sealed, self._era = len(matches), self.pool.era

    def missing(self, length: int) -> int:
        """Blocks that have to be taken before tokens `held` … `length` - 1 can be written."""
        return max(0, -(-length // self.pool.block_tokens) - len(self.blocks)) + self._writes_fixed()

    def reserve(self, length: int) -> list[tuple[int, int]]:
        """Take what is missing. The contents to be copied before anything is written: (source, target)."""
        copies = []
        if self._writes_fixed():
            place = self.held // self.pool.block_tokens
            source, target = self.blocks[place], self.pool.take()
            self.pool.release([source])
            self.blocks[place] = target
            copies.append((source, target))
        while len(self.blocks) * self.pool.block_tokens < length:
            self.blocks.append(self.pool.take())
        return copies

    def _writes_fixed(self) -> bool:
        """Whether the next token would go into a block that another table has too."""
        place = self.held // self.pool.block_tokens
        return place < len(self.blocks) and self.pool.fixed(self.blocks[place])

    def advance(self, held: int) -> None:
        """The blocks hold `held` tokens now (fewer than were written where drafts were refused). Full ones are known
        to the pool from here on."""
        self.held = held
        if self._era == self.pool.era:
            for place in range(self._sealed, held // self.pool.block_tokens):
                self.pool.seal(self.blocks[place], self.digest(place))
            self._sealed = max(self._sealed, held // self.pool.block_tokens)

    def fork(self, other: Table) -> None:
        """Hold what `other` holds, in the same blocks, instead of what this one held: the texts are equal so far."""
        blocks = other.blocks[: -(-other.held // self.pool.block_tokens)]
        for block in blocks:
            self.pool.share(block)
        self.release()
        self.blocks, self.held, self._sealed, self._era = blocks, other.held, other._sealed, other._era
        self._digests = list(other._digests)

    def sound(self) -> None:
        """The logits after the last token held are numbers, and so is everything that they were computed from."""
        size = self.pool.block_tokens
        if self._judged < self.held:
            self.pool.judge(self.blocks[self._judged // size : -(-self.held // size)], True)
            self._judged = self.held

    def unsound(self) -> None:
        """They are not: whoever takes these blocks next has to make them zero (0 · NaN = NaN, even where masked)."""
        self.pool.judge(self.blocks, False)

    def release(self) -> None:
        """Hold nothing any more."""
        self.pool.release(reversed(self.blocks))
        self.blocks, self.held, self._sealed, self._judged = [], 0, 0, 0


def wasted(tables: Iterable[Table], block_tokens: int) -> int:
    """Slots in used blocks that hold no token: the unwritten ends of last blocks. Each block counts once, however
    many share it."""
    empty: dict[int, int] = {}
    for table in tables:
        blocks, held = table.blocks, table.held  # another thread may give them up meanwhile
        for place in range(held // block_tokens, len(blocks)):
            block, filled = blocks[place], max(0, held - place * block_tokens)
            empty[block] = min(empty.get(block, block_tokens), block_tokens - filled)
    return sum(empty.values())
