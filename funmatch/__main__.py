"""`python -m funmatch`."""

from funmatch.cli import main

if __name__ == "__main__":
    main()
