"""`finetune train` as a script, for launchers that start one.

accelerate launch scripts/train.py CONFIG [key=value ...] [--resume auto]
"""

import sys

from finetune.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
