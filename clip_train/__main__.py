"""`python -m clip_train` and `torchrun -m clip_train` are the `clip-train` command."""

from clip_train.cli import main

if __name__ == "__main__":
    main()
