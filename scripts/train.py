"""`accelerate launch scripts/train.py CONFIG [key=value ...] [--resume auto]` is `finetune train` on many processes."""

import sys

from finetune.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
