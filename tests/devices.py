"""The devices there are: laws about one are tested on each."""

import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
