# SPDX-License-Identifier: Apache-2.0
"""Learn2PD's filter is made here: traces recorded, filters trained, also while serving.

The strategy that uses a filter is `strategies/learn2pd.py`; the engine finds the
recorder and the learning by name, as an observer.
"""
