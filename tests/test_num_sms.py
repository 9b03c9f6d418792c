"""How many SMs a transfer takes, from rates."""

import pytest

from ep_kernels import env, num_sms
from ep_kernels.errors import EPConfigError
from ep_kernels.num_sms import measure_num_sms, num_sms_for


@pytest.mark.parametrize(
    ("of_all", "of_one", "expected"),
    [(540e9, 75e9, 11), (400e9, 75e9, 8), (540e9, 75e9 * 1000, 1), (5e12, 75e9, 24)],
)
def test_as_many_as_reach_the_rate_with_a_margin(of_all, of_one, expected):
    assert num_sms_for(of_all, of_one, max_num_sms=24) == expected


def test_the_rates_are_medians_of_copies_within_the_pool():
    asked = []

    def copy_rate(sms, num_bytes):
        asked.append((sms, num_bytes))
        return [1.0, 400e9, 480e9, 440e9, 1.0, 40e9, 44e9, 45e9][len(asked) - 1]

    chosen = measure_num_sms(copy_rate, pool_bytes=20 << 20, max_num_sms=16)
    assert chosen == 15  # 1.5 * 440 / 44
    assert asked == [(16, 5 << 20)] * 4 + [(1, 2 << 20)] * 4


def test_a_small_pool_gets_the_default():
    chosen = measure_num_sms(pytest.fail, pool_bytes=1024, max_num_sms=66)
    assert chosen == num_sms.DEFAULT


def test_the_environment_may_say_it(monkeypatch):
    monkeypatch.delenv("EP_KERNELS_NUM_SMS", raising=False)
    assert env.num_sms() is None
    monkeypatch.setenv("EP_KERNELS_NUM_SMS", "12")
    assert env.num_sms() == 12
    monkeypatch.setenv("EP_KERNELS_NUM_SMS", "many")
    with pytest.raises(EPConfigError, match="EP_KERNELS_NUM_SMS='many'"):
        env.num_sms()
