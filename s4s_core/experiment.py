"""The former name of the command: `python -m s4s_core.experiment ...` is `s4s run ...`."""

import sys

from .__main__ import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
