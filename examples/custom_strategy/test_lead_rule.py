# SPDX-License-Identifier: Apache-2.0
"""Does the strategy keep the contract? `pytest`, where it is installed."""

from lead_rule import Lead

from vllm_dlm.testing import check_strategy


def test_it_keeps_the_contract():
    print(check_strategy(Lead, params={"least": 0.7}, required=True))
