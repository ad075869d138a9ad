"""`python -m heterorl` is the command `heterorl`."""

from heterorl.cli import main

if __name__ == "__main__":
    main()
