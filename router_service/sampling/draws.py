"""Random numbers by counter: a draw depends on (seed, position) and on nothing else."""

from __future__ import annotations

_MASK = 2**64 - 1
_ROUNDS = 10
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)


def uniform(seed: int, position: int) -> float:
    """A float64 in [0, 1), the same wherever and beside whatever it is drawn.

    `seed` is taken modulo 2^64.
    """
    word = philox((position & _MASK, 0, 0, 0), (seed & _MASK, 0))[0]
    return (word >> 11) * 2.0**-53


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x64-10 (Salmon et al. 2011): four 64-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c2 = (product1 >> 64) ^ c1 ^ k0, (product0 >> 64) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
