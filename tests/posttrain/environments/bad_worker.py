"""A worker whose environment does what the model says: it crashes, hangs, floods, raises, or rewards with no number."""

import os
import time

from orogen.posttrain.environments import make, worker
from orogen.posttrain.environments.interface import Turn, asked, over


class Bad:
    """See above."""

    def __init__(self, config):
        pass

    def example(self, number):
        return asked(str(number), "", None)

    def step(self, example, state, said):
        if said.text == "crash":
            os._exit(3)
        if said.text == "hang":
            time.sleep(60)
        if said.text == "flood":
            return Turn(None, replies=[{"role": "tool", "content": "x" * 2**23}])
        if said.text == "raise":
            raise RuntimeError("no verdict\nin two lines")
        if said.text == "memory":
            return Turn("x" * 2**31)
        if said.text == "print":
            print("noise" * 2**18)
        if said.text == "left out":
            return Turn(None, rewards={"a": 0.5}, left_out=3)
        return Turn(None, rewards={"a": float(said.text)}) if said.text in ("nan", "-1e308") else over(a=0.5)


if __name__ == "__main__":
    make.MAKERS["synthetic"] = Bad
    worker.main()
