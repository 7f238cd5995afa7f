# SPDX-License-Identifier: Apache-2.0
"""For authors of decoding strategies: does a strategy keep the contract?

    from vllm_dlm.testing import check_strategy

    def test_contract():
        print(check_strategy(MyStrategy, params={"threshold": 0.8}))

`check_strategy` decodes random blocks with the strategy, and raises an AssertionError
that says what is wrong, why the engine minds, and how it is put right.
"""

from vllm_dlm.testing.check import check_strategy
from vllm_dlm.testing.report import Report

__all__ = ["Report", "check_strategy"]
