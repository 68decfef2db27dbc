"""The tests. Set before any library is imported, here and in every process that the tests start."""

import os

os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
