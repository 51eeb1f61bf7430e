from __future__ import annotations

import numpy as np
import pytest

from services.core.planning.kernels import MeasuredKernel, Roofline

MEASURED = MeasuredKernel(
    rows=(1.0, 16.0, 64.0), fixed_s=(1e-5, 1e-5, 2e-5), s_per_byte=(1e-10, 1e-10, 3e-10)
)


def test_a_roofline_is_flat_until_arithmetic_takes_longer_than_reading() -> None:
    roofline = Roofline(bandwidth=1e9, flops=1e12, launch_s=1e-3)
    # 2 GB read: 2 s; 1e9 weights: 2 ms a row, so 1000 rows are even.
    times = roofline.time_s(2e9, 1e9, [0, 1, 1000, 2000])
    assert times.tolist() == pytest.approx([0.0, 2.001, 2.001, 4.001])
    assert not roofline.is_compute_bound(2e9, 1e9, 999)
    assert roofline.is_compute_bound(2e9, 1e9, 1001)


def test_a_measured_kernel_gives_back_what_was_measured() -> None:
    times = MEASURED.time_s(2e6, 1e6, [1, 16, 64])
    assert times.tolist() == pytest.approx([2.1e-4, 2.1e-4, 6.2e-4])


def test_a_measured_kernel_goes_on_beyond_the_last_row_count() -> None:
    near, far, farther = MEASURED.time_s(2e6, 1e6, [64, 128, 192])
    assert far - near == pytest.approx(farther - far)
    assert far > near


def test_fewer_bits_save_reading_but_no_arithmetic() -> None:
    few = MEASURED.time_s(np.float64(5e5), 1e6, [1, 64])
    full = MEASURED.time_s(np.float64(2e6), 1e6, [1, 64])
    assert few[0] == pytest.approx(1e-5 + 5e5 * 1e-10)
    assert full[1] - few[1] == pytest.approx(full[0] - few[0])


def test_a_measured_kernel_tells_reading_from_arithmetic() -> None:
    assert not MEASURED.is_compute_bound(2e6, 1e6, 16)
    assert MEASURED.is_compute_bound(2e6, 1e6, 128)
