"""The pool's books: who refers to what, what is found again, what is given up first."""

from __future__ import annotations

import random

from fledge.inference.blocks import BlockPool, Table, wasted


def filled(pool: BlockPool, ids: list[int]) -> Table:
    """A sequence whose every token has been read."""
    table = Table(pool, ids)
    table.begin(table.matches())
    table.reserve(len(ids))
    table.advance(len(ids))
    return table


def test_a_prefix_is_found_in_whole_blocks_and_leaves_a_token_to_read() -> None:
    pool = BlockPool(16, 4)
    first = filled(pool, list(range(10)))
    assert pool.used == 3 and pool.reach == 3
    for ids, matched in (
        (list(range(10)), 2),
        (list(range(8)), 1),  # its last token must be read, and with it its block
        (list(range(9)), 2),
        ([0, 1, 2, 3, 9, 5, 6, 7, 8], 1),
        ([1, 1, 2, 3, 4, 5, 6, 7, 8], 0),  # the second block alone is another text
        ([0, 1, 2], 0),
    ):
        assert Table(pool, ids).matches() == first.blocks[:matched], ids
    assert Table(pool, list(range(10)), key="other adapter").matches() == []
    assert filled(pool, list(range(9))).blocks[:2] == first.blocks[:2]
    assert pool.used == 4, "two shared, one tail each"


def test_released_content_stays_until_room_is_needed_the_longest_unused_first() -> None:
    pool = BlockPool(5, 2)
    one, two = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    one.release()
    two.release()
    assert (pool.used, pool.cached, pool.available) == (0, 4, 5)
    assert len(Table(pool, [1, 2, 3, 4, 0]).matches()) == 2
    third = filled(pool, [9] * 5)  # one block was never used, two are given up: the ends before the beginnings
    assert pool.used == 3 and pool.reach == 5
    assert len(Table(pool, [1, 2, 3, 4, 0]).matches()) == 0 and len(Table(pool, [5, 6, 7, 8, 0]).matches()) == 2
    third.release()
    assert pool.used == 0 and pool.cached == 4, "the block that was not full is free"


def test_a_shared_block_is_copied_before_it_is_written() -> None:
    pool = BlockPool(8, 4)
    first = filled(pool, [1, 2, 3, 4, 5, 6])
    second = Table(pool, list(first.ids))
    second.fork(first)
    assert second.blocks == first.blocks and pool.used == 2
    assert [t.missing(7) for t in (first, second)] == [1, 1]
    copies = first.reserve(7)
    assert copies == [(second.blocks[1], first.blocks[1])] and first.blocks[0] == second.blocks[0]
    assert second.missing(7) == 0 and second.reserve(7) == [], "the last one keeps it"
    assert pool.used == 3
    for table in (first, second):
        table.release()
    assert pool.used == 0


def test_refused_drafts_leave_no_trace() -> None:
    pool = BlockPool(8, 4)
    table = filled(pool, [1, 2, 3])
    table.reserve(3 + 6)  # the last token and five guesses
    table.ids.append(4)
    table.advance(4)  # all guesses were refused
    assert Table(pool, [1, 2, 3, 4, 5]).matches() == table.blocks[:1]
    assert table.reserve(5) == [] and len(table.blocks) == 3
    assert not pool.fixed(table.blocks[1])


def test_after_forgetting_nothing_is_found_and_nothing_old_is_offered() -> None:
    pool = BlockPool(8, 2)
    running, left = filled(pool, [1, 2, 3]), filled(pool, [4, 5, 6, 7])
    left.release()
    pool.forget()
    assert pool.cached == 0 and pool.used == 2
    running.ids += [9, 9]
    running.reserve(5)
    running.advance(5)  # begun with the old weights: not for others
    assert (
        Table(pool, [1, 2, 3]).matches()
        == Table(pool, [4, 5, 6]).matches()
        == Table(pool, [1, 2, 3, 9, 9]).matches()
        == []
    )
    running.release()
    assert pool.used == 0 and pool.cached == 0
    assert filled(pool, [1, 2, 3]) and len(Table(pool, [1, 2, 3]).matches()) == 1


def test_waste_counts_every_block_once() -> None:
    pool = BlockPool(8, 4)
    first = filled(pool, [1, 2, 3, 4, 5])
    second = Table(pool, list(first.ids))
    second.fork(first)
    assert wasted([first, second], 4) == 3
    first.reserve(9)  # its own tail of one token, and a block still empty
    assert wasted([first, second], 4) == 3 + 3 + 4


def test_random_use_keeps_the_books_right() -> None:
    """Whatever happens: no block is lost, none has two owners that write, the size holds."""
    rng = random.Random(0)
    pool = BlockPool(40, 3)
    tables: list[Table] = []
    found = 0
    for _ in range(4000):
        action = rng.random()
        if action < 0.4:
            table = Table(pool, [rng.randrange(2) for _ in range(rng.randint(1, 12))])
            matches = table.matches()
            table.begin(matches)
            if table.missing(len(table.ids)) <= pool.available:
                found += len(matches)
                table.reserve(len(table.ids))
                table.advance(len(table.ids))
                tables.append(table)
            else:
                table.release()
        elif action < 0.6 and tables:
            tables.pop(rng.randrange(len(tables))).release()
        elif action < 0.7 and tables:
            other = rng.choice(tables)
            fork = Table(pool, list(other.ids))
            fork.fork(other)
            tables.append(fork)
        elif action < 0.71:
            pool.forget()
        elif tables:
            table = rng.choice(tables)
            if table.missing(table.held + 1) <= pool.available:
                table.reserve(table.held + 1)
                target = table.blocks[table.held // 3]
                assert sum(target in other.blocks for other in tables) == 1 and not pool.fixed(target)
                table.ids.append(rng.randrange(2))
                table.advance(table.held + 1)
        used = {block for table in tables for block in table.blocks}
        assert pool.used == len(used) and pool.used + pool.available == pool.size == 40
        assert pool.reach <= 40 and pool.cached <= pool.available
    assert found > 100
    for table in tables:
        table.release()
    assert pool.used == 0
