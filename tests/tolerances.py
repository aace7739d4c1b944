"""How near is equal: one table, each with its reason."""

EXACT = {"rtol": 0.0, "atol": 0.0}
"""The same operations in the same order: copies, reloads, cached weights."""

FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
"""Two exact ways to compute the same in float64: a few thousand roundings of 1e-16, after an SVD."""

FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
"""Two orders of summation in float32: 1e-7 a rounding, some hundred terms, numbers of order one."""

BFLOAT16 = {"rtol": 5e-2, "atol": 5e-2}
"""Eight bits of mantissa, in each of three or four factors and in every step of the activation."""
