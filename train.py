"""Firefly's launcher: `python train.py --train_args_file CONFIG.json` does what `pyralis train CONFIG.json` does.

Also under `torchrun train.py ...`, `deepspeed train.py ...` and `accelerate launch train.py ...`.
"""

from pyralis.cli.launcher import main

if __name__ == "__main__":
    main()
