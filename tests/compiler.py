"""Whether torch.compile can be tried on this machine's CPU."""

import torch

from pipeline_train import compat, native

CAN = compat.release(torch.__version__) >= (2, 6) and native.without_cpp() is None
WHY_NOT = "torch.compile needs torch 2.6 and a C++ compiler"
