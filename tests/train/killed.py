"""The command line on synthetic data, ended by a signal: ``python -m tests.train.killed WHEN train ...``.

WHEN is ``SIGTERM:8``, in the middle of that step; ``writing:10``, by SIGKILL, when half of that step's checkpoint is
written; or ``never``.
"""

import io
import os
import signal
import sys
from typing import Any

import pytest
import torch

from rarefy.cli import main
from rarefy.train import Classification, run_folder
from tests.train.runs import prepare


def arrange(when: str, patch: pytest.MonkeyPatch) -> None:
    what, _, number = when.partition(":")
    if what == "never":
        return
    learn, save = Classification._learn, torch.save

    def learn_or_die(self: Classification, content: Any) -> None:
        learn(self, content)
        if self.step == int(number):
            os.kill(os.getpid(), signal.Signals[what])

    def save_half(state: dict[str, Any], file: Any) -> None:
        if state["step"] != int(number):
            return save(state, file)
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    if what == "writing":
        patch.setattr(run_folder.torch, "save", save_half)
    else:
        patch.setattr(Classification, "_learn", learn_or_die)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        arrange(sys.argv[1], patch)
        sys.exit(main(sys.argv[2:]))
