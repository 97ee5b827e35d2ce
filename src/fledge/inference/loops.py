"""What a step of a LLaMA-like model computes, as loops: norm, product, rotation, attention, gate, rounding to 8 bits.

Each is what an instruction of a program (`program.py`) does; all threads carry it out together. Every row is computed
by itself and in order: no result depends on what else is in the step, on the number of threads or on how a program is
cut.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from fledge.inference import kernels, tiles

try:
    from numba import carray

    from fledge.inference.int4 import unpack
    from fledge.inference.kernels import (
        as_float,
        as_pattern,
        barrier,
        exp,
        load16,
        load32,
        loop,
        narrow,
        pointer,
        prefetch,
        store16,
        store32,
        thread_count,
        thread_number,
        widen,
    )  # fmt: skip
except ImportError:
    pass

BLOCK = 16
"""tokens in a block of keys and values: the numbers in a register"""
WIDTH = 20
"""whole numbers of an instruction"""
_LOWEST = np.float32(-3e38)


class Op(IntEnum):
    """What an instruction does; its arguments are those of the loop of that name (PRODUCT…: `product`)."""

    NORM = 0
    PRODUCT = 1
    PRODUCT_INT8 = 2
    PRODUCT_INT4 = 3
    TO_INT8 = 4
    GATE = 5
    ROTATE = 6
    ATTEND = 7


PAIR = 6 * 64
"""sums of a tile: those of the second of a pair lie so far behind those of the first"""
PLAIN, GATED, WIDE = 0, 1, 2
"""what a product becomes: rounded to the number format; gate · up, gated (SwiGLU); fp32"""


if kernels.numba is not None:

    @loop
    def _get(address: Any, place: Any, half: bool) -> Any:
        """The number at a place of an array of bfloat16 (`half`) or fp32, as fp32."""
        if half:
            return widen(load16(address, place))
        return as_float(load32(address, place))

    @loop
    def _put(address: Any, place: Any, value: Any, half: bool) -> None:
        if half:
            store16(address, place, narrow(value))
        else:
            store32(address, place, as_pattern(value))

    @loop
    def _rounded(value: Any, half: bool) -> Any:
        return widen(narrow(value)) if half else value

    @loop
    def _silu(x: Any) -> Any:
        return x / (np.float32(1) + exp(min(-x, np.float32(80))))

    @loop
    def _scaled(sums: Any, by_row: Any, by_column: Any, shifts: Any, column: Any, count: int) -> None:
        """Whole numbers become fp32, in place."""
        for d in range(count):
            whole = np.int32(load32(sums, d)) - np.int32(load32(shifts, column + d))
            _put(sums, d, np.float32(whole) * _get(by_column, column + d, False) * by_row, False)

    @loop
    def _softmax(
        scores: Any, best_at: Any, low: Any, high: Any, start: Any, end: Any, scale: Any, softcap: Any, slope: Any
    ) -> Any:
        """Scores of a row become weights, in place; what their sum has to be multiplied by. Keys from `start` to `end`
        count. 64 scores, of the blocks low to high by fours, lie 1,536 bytes apart."""
        best = carray(pointer(best_at), (64,), np.float32)
        for j in range(64):
            best[j] = _LOWEST
        for b in range(low, high, 4):
            s = carray(pointer(scores + (b - low) // 4 * 1536), (64,), np.float32)
            for j in range(64):
                s[j] *= scale
            if softcap > 0:
                for j in range(64):
                    e = exp(min(max(s[j] / softcap, np.float32(-40)), np.float32(40)) * np.float32(2))
                    s[j] = softcap * (np.float32(1) - np.float32(2) / (e + np.float32(1)))
            if slope != 0:
                for j in range(64):
                    s[j] += slope * np.float32(b * 16 + j)
            if b * 16 < start or b * 16 + 64 > end:
                for j in range(64):
                    if b * 16 + j < start or b * 16 + j >= end:
                        s[j] = _LOWEST
            for j in range(64):
                best[j] = max(best[j], s[j])
        highest, total = _LOWEST, np.float32(0)
        for j in range(64):
            highest = max(highest, best[j])
        for b in range(low, high, 4):
            s = carray(pointer(scores + (b - low) // 4 * 1536), (64,), np.float32)
            for j in range(64):
                e = exp(s[j] - highest)
                e = np.float32(0) if s[j] == _LOWEST else e
                s[j] = e
                total += e
        return np.float32(1) / total

    def _for(half: bool, multiply: Any, score: Any, add: Any, add_few: Any) -> Any:
        """What carries out an instruction on bfloat16 (`half`) or fp32, with the tiles for it."""

        @loop
        def norm(t: Any, n: Any, a: Any) -> None:
            """out = x / √(mean(x²) + ε) · w by row (Zhang & Sennrich, 2019). x, w, out, rows, width, bits(ε)."""
            size, width, least, weights = 2 if half else 4, a[5], as_float(np.uint32(a[6])), a[2]
            for row in range(t, a[4], n):
                x, out = a[1] + row * width * size, a[3] + row * width * size
                total = np.float32(0)
                for d in range(width):
                    value = _get(x, d, half)
                    total += value * value
                scale = np.float32(1) / np.sqrt(total / np.float32(width) + least)
                for d in range(width):
                    _put(out, d, _get(x, d, half) * scale * _get(weights, d, half), half)

        @loop
        def gate(t: Any, n: Any, a: Any) -> None:
            """out = silu(x[:, :width]) · x[:, width:] (SwiGLU: Shazeer, 2020). x, out, rows, width."""
            size, width = 2 if half else 4, a[4]
            for row in range(t, a[3], n):
                x, out = a[1] + row * 2 * width * size, a[2] + row * width * size
                for d in range(width):
                    _put(out, d, _silu(_get(x, d, half)) * _get(x, width + d, half), half)

        @loop
        def to_int8(t: Any, n: Any, a: Any) -> None:
            """Rows as whole numbers 1 … 255 (128 is zero), and a scale each. x, out, scales, rows, width."""
            size, width = 2 if half else 4, a[5]
            scales = carray(pointer(a[3]), (a[4],), np.float32)
            for row in range(t, a[4], n):
                x, out = a[1] + row * width * size, carray(pointer(a[2] + row * width), (width,), np.uint8)
                most = as_pattern(np.float32(1e-12))
                for d in range(
                    width
                ):  # patterns of positive numbers are in the order of the numbers, and NaN is beyond
                    most = max(most, as_pattern(_get(x, d, half)) & np.uint32(0x7FFFFFFF))
                highest = as_float(most)
                scale = np.float32(127) / highest
                for d in range(width):  # to the nearest: the whole part of what is positive
                    out[d] = np.uint8(np.int32(_get(x, d, half) * scale + np.float32(128.5)))
                scales[row] = highest / np.float32(127)

        @loop
        def _finished(
            sums: Any, out: Any, place: Any, column: Any, bias: Any, residual: Any, becomes: Any, count: int
        ) -> None:
            """`count` sums of a row go to `out` from `place` on."""
            if bias != 0:
                for d in range(count):
                    _put(sums, d, _get(sums, d, False) + _get(bias, column + d, half), False)
            if residual != 0:
                for d in range(count):
                    _put(sums, d, _get(sums, d, False) + _get(residual, place + d, half), False)
            if becomes == WIDE:
                for d in range(count):
                    _put(out, place + d, _get(sums, d, False), False)
            elif becomes == GATED:
                for d in range(count):
                    gate_, up = _rounded(_get(sums, d, False), half), _rounded(_get(sums, PAIR + d, False), half)
                    _put(out, place + d, _silu(gate_) * up, half)  # both rounded, as the model rounds them
            else:
                for d in range(count):
                    _put(out, place + d, _get(sums, d, False), half)

        @loop
        def product(t: Any, n: Any, a: Any, scratch: Any) -> None:
            """out = x · wᵀ [+ bias] [+ residual], or silu(gate) · up of a pair of products (`GATED`, without bias).

            x, w (packed, see `tiles.pack`), out, rows, inner width, outputs, bias or 0, residual or 0, becomes; where x
            is in 8 bits (`to_int8`) its scales, the outputs' scales, and 128 · the sum of each output's weights;
            where w is in 4 bits (`int4.Int4`, its pairs) its steps and offsets.
            Threads share out tiles, six rows of 64 outputs each.
            """
            packed = a[0] == Op.PRODUCT_INT4
            whole = a[0] == Op.PRODUCT_INT8 or packed
            x_at, w_at, out, rows, width = a[1], a[2], a[3], a[4], a[5]
            bias, residual, becomes, by_row, by_column, shifts = a[7], a[8], a[9], a[10], a[11], a[12]
            x_row = width if whole else (width * 2 if half else width * 4)
            block = x_row * 64
            parts = 2 if becomes == GATED else 1
            outputs = a[6] // parts
            blocks, groups = (outputs + 63) // 64, (rows + 5) // 6
            total, held = blocks * groups, np.int64(-1)
            each, unpacked = x_row // 32, scratch + 2 * PAIR * 4  # groups of 32 inputs, and where they are unpacked to
            for item in range(t * total // n, (t + 1) * total // n):
                place, row = item // groups, item % groups * 6
                if packed and groups > 1 and place != held:  # other rows want these weights, too
                    held = place
                    for part in range(parts):
                        first = (part * blocks + place) * each
                        at = unpacked + part * block
                        unpack(w_at + first * 1024, a[13] + first * 64, a[14] + first * 64, at, each)
                column = place * 64
                lines, count = min(6, rows - row), min(64, outputs - column)
                x, ahead = x_at + row * x_row, (block if place + 1 < blocks else 0) + item % groups % 4 * 64
                for part in range(parts):
                    w, sums = w_at + (part * blocks + place) * block, scratch + part * PAIR * 4
                    if packed and groups == 1:
                        for begin in range(0, each, 8):  # as much as stays in the first cache
                            first, some = (part * blocks + place) * each + begin, min(8, each - begin)
                            unpack(w_at + first * 1024, a[13] + first * 64, a[14] + first * 64, unpacked, some)
                            tiles.product_int8(
                                lines, x + begin * 32, x_row, unpacked, unpacked + 64, unpacked + 128, unpacked + 192,
                                256, some * 8, sums, 256, begin == 0, unpacked,
                            )  # fmt: skip
                        continue
                    if packed:
                        w = unpacked + part * block
                    if whole:
                        tiles.product_int8(lines, x, x_row, w, w + 64, w + 128, w + 192, 256, x_row // 4, sums, 256, 1,
                                           w + ahead)  # fmt: skip
                    else:
                        multiply(lines, x, x_row, w, w + 64, w + 128, w + 192, 256, x_row // 4, sums, 256, 1,
                                 w + ahead)  # fmt: skip
                for r in range(lines):
                    sums, at = scratch + r * 256, (row + r) * outputs + column
                    if whole:
                        for part in range(parts):
                            _scaled(sums + part * PAIR * 4, _get(by_row, row + r, False), by_column, shifts,
                                    column + part * outputs, count)  # fmt: skip
                    if count == 64:
                        _finished(sums, out, at, column, bias, residual, becomes, 64)
                    else:
                        _finished(sums, out, at, column, bias, residual, becomes, count)

        @loop
        def _turned(x: Any, d: Any, other: Any, cos: Any, sin: Any) -> Any:
            """Number d of a head, which turns with its `other`."""
            return _get(x, d, half) * _get(cos, d, half) + _get(x, other, half) * _get(sin, d, half)

        @loop
        def rotate(t: Any, n: Any, a: Any) -> None:
            """Positions into query and key (Su et al., RoFormer, 2021); query to `out`, key and value to their blocks.

            mixed (T, (H + 2 KV) · D), cos, sin (T, D; sin with the sign of the half it meets), out (T, H, D), pool (2,
            KV, blocks, block · D), slots (kept,), kept, T, blocks, H, KV, then weights of the norms by head of query
            and key, or 0, bits(ε), D. Tokens from `kept` on are nobody's: nothing is kept of them. Keys lie as tiles
            read them: (D / n, block, n), n numbers in four bytes.
            """
            size, together, dim = 2 if half else 4, 2 if half else 1, a[15]
            middle = dim // 2
            kept, count, blocks, heads, kv_heads = a[7], a[8], a[9], a[10], a[11]
            width = (heads + 2 * kv_heads) * dim
            for token in range(t, count, n):
                cos, sin = a[2] + token * dim * size, a[3] + token * dim * size
                slot = np.int64(0)
                if token < kept:
                    slot = carray(pointer(a[6]), (kept,), np.int64)[token]
                for head in range(heads + 2 * kv_heads):
                    x = a[1] + (token * width + head * dim) * size
                    if head >= heads and token >= kept:
                        break
                    plane = a[5] + ((head - heads) * blocks + slot // 16) * 16 * dim * size
                    if head >= heads + kv_heads:
                        line = plane + slot % 16 * dim * size
                        for d in range(dim):
                            _put(line, d, _get(x, d, half), half)
                        continue
                    weights = a[12] if head < heads else a[13]
                    scale = np.float32(1)
                    if weights != 0:
                        total = np.float32(0)
                        for d in range(dim):
                            total += _get(x, d, half) * _get(x, d, half)
                        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + as_float(np.uint32(a[14])))
                        for d in range(dim):  # rounded, as the model rounds it
                            _put(x, d, _get(x, d, half) * scale * _get(weights, d, half), half)
                    if head < heads:
                        out = a[4] + (token * heads + head) * dim * size
                        for d in range(middle):
                            _put(out, d, _turned(x, d, d + middle, cos, sin), half)
                        for d in range(middle, dim):
                            _put(out, d, _turned(x, d, d - middle, cos, sin), half)
                    else:
                        at = slot % 16 * together
                        for d in range(dim):
                            value = _turned(x, d, d + middle if d < middle else d - middle, cos, sin)
                            _put(plane, d // together * 16 * together + at + d % together, value, half)

        @loop
        def attend(t: Any, n: Any, a: Any, scratch: Any) -> None:
            """Causal attention over a pool of blocks: each new token to its sequence's keys, softmax in fp32.

            query, pool, out (T, H, D), pieces (count, 4: first token in the step, tokens, position of the first, row of
            the table), table (rows, width), count, H, KV, blocks, width, bits(scale), window (0: none), slopes (H,) or
            0, bits(softcap) (0: none), D. Six rows (tokens, heads of one key head) at a time meet 64 keys at a time.
            """
            count, heads, groups, blocks, width, dim = a[6], a[7], a[8], a[9], a[10], a[15]
            size, steps, shared = 2 if half else 4, dim // 2 if half else dim, heads // groups
            chunk = 16 * size
            scale, window, softcap = as_float(np.uint32(a[11])), a[12], as_float(np.uint32(a[14]))
            pieces = carray(pointer(a[4]), (count, 4), np.int64)
            whole = 16 * dim * size  # bytes of a block
            q, o = scratch, scratch + 6 * dim * 4
            scores = o + 6 * max(dim, 16) * 4
            for item in range(t, count * groups, n):
                head, at = item % groups, item // groups
                table = carray(pointer(a[5] + pieces[at, 3] * width * 8), (width,), np.int64)
                keys, values = a[2] + head * blocks * whole, a[2] + (groups + head) * blocks * whole
                follower = min(item + n, count * groups - 1)
                next_keys, after = a[2] + follower % groups * blocks * whole, follower // groups
                next_table = carray(pointer(a[5] + pieces[after, 3] * width * 8), (width,), np.int64)
                soon = (pieces[after, 2] + 16) // 16
                lines = pieces[at, 1] * shared
                for line in range(0, lines, 6):
                    rows = min(6, lines - line)
                    early = pieces[at, 2] + line // shared + 1  # keys of the first row, and of the last
                    late = pieces[at, 2] + (line + rows - 1) // shared + 1
                    # By fours from the first: where a key's weight is added depends on its position alone.
                    low = max(early - window, 0) // 64 * 4 if window > 0 else 0
                    high = (late + 15) // 16
                    for r in range(rows):
                        token, g = (line + r) // shared, (line + r) % shared
                        given = a[1] + ((pieces[at, 0] + token) * heads + head * shared + g) * dim * size
                        for d in range(dim):
                            _put(q, r * dim + d, _get(given, d, half), half)
                    for b in range(low, high, 4):
                        k0 = keys + table[b] * whole
                        k1 = keys + table[min(b + 1, high - 1)] * whole
                        k2 = keys + table[min(b + 2, high - 1)] * whole
                        k3 = keys + table[min(b + 3, high - 1)] * whole
                        if line == 0:  # while keys are read, the values come
                            for ahead in range(b, min(b + 4, high)):
                                for byte in range(0, whole, 64):
                                    prefetch(values + table[ahead] * whole + byte)
                        s = scores + (b - low) // 4 * 6 * 256
                        score(rows, q, dim * size, k0, k1, k2, k3, 64, steps, s, 256, 1, 0)
                    for r in range(rows):
                        g = head * shared + (line + r) % shared
                        end = pieces[at, 2] + (line + r) // shared + 1
                        start = max(end - window, 0) if window > 0 else 0
                        slope = _get(a[13], g, False) if a[13] != 0 else np.float32(0)
                        share = _softmax(scores + r * 256, o, low, high, start, end, scale, softcap, slope)
                        _put(q, r, share, False)  # the query has been read
                    for b in range(low, high):
                        if line + 6 >= lines and b < soon:  # while values are read, the keys of what comes next
                            for byte in range(0, whole, 64):
                                prefetch(next_keys + next_table[b] * whole + byte)
                        v = values + table[b] * whole
                        p = scores + (b - low) // 4 * 1536 + (b - low) % 4 * 64
                        for d in range(0, dim // 64 * 64, 64):
                            c, w = o + d * 4, v + d * size
                            add(rows, p, 256, w, w + chunk, w + 2 * chunk, w + 3 * chunk, dim * size, 16, c, dim * 4,
                                b == low, 0)  # fmt: skip
                        for d in range(dim // 64 * 64, dim, 16):
                            c, w = o + d * 4, v + d * size
                            add_few(rows, p, 256, w, w, w, w, dim * size, 16, c, dim * 4, b == low, 0)
                    for r in range(rows):
                        token, g = (line + r) // shared, (line + r) % shared
                        out = a[3] + ((pieces[at, 0] + token) * heads + head * shared + g) * dim * size
                        share = _get(q, r, False)
                        for d in range(dim):
                            _put(out, d, _get(o, r * dim + d, False) * share, half)

        @loop
        def carry_out(t: Any, n: Any, a: Any, scratch: Any) -> None:
            if a[0] == Op.NORM:
                norm(t, n, a)
            elif a[0] == Op.TO_INT8:
                to_int8(t, n, a)
            elif a[0] == Op.GATE:
                gate(t, n, a)
            elif a[0] == Op.ROTATE:
                rotate(t, n, a)
            elif a[0] == Op.ATTEND:
                attend(t, n, a, scratch)
            else:
                product(t, n, a, scratch)

        return carry_out

    @loop
    def all_of(given: Any, carry_out: Any, count: Any) -> None:
        """All instructions in order; the threads wait for each other after each."""
        head = carray(given, (4,), np.int64)
        t, n = np.int64(thread_number()), np.int64(thread_count())
        for number in range(count):
            carry_out(t, n, carray(pointer(head[0] + number * WIDTH * 8), (WIDTH,), np.int64), head[2] + t * head[3])
            if number + 1 < count:
                barrier()

    in_fp32 = _for(False, tiles.product_fp32, tiles.scores_fp32, tiles.sums_fp32, tiles.sum_fp32)
    in_bf16 = _for(True, tiles.product_bf16, tiles.scores_bf16, tiles.sums_bf16, tiles.sum_bf16)
