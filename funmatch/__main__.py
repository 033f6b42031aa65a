"""The program `funmatch`, also as `python -m funmatch`."""

from funmatch.runtime.signals import exit_on_signals


def main() -> None:
    """Runs the command line."""
    # Before the imports of the command line, which take a moment.
    exit_on_signals()
    from funmatch.commands.common.imports import no_collections

    with no_collections():
        from funmatch import cli

    cli.main()


if __name__ == "__main__":
    main()
