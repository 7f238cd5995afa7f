# SPDX-License-Identifier: Apache-2.0
from hypothesis import settings

# On a busy machine an example may take long for no fault of the code's.
settings.register_profile("vllm_dlm", deadline=None)
settings.load_profile("vllm_dlm")
