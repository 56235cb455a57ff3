"""`python -m nld_cuda` is the `nld` command."""

from nld_cuda.cli import main

if __name__ == "__main__":
    main()
