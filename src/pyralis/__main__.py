"""`python -m pyralis` is the command `pyralis`."""

from pyralis.cli.main import main

if __name__ == "__main__":
    main()
