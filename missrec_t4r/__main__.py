"""``missrec`` and ``python -m missrec_t4r``."""

import sys

_INTERRUPTED = 130
"""128 + SIGINT: the exit code of a command that Ctrl-C ended."""


def main() -> None:
    """Run the command line; Ctrl-C ends it with one line, also while it is being imported."""
    try:
        from missrec_t4r.cli import app

        app()
    except (KeyboardInterrupt, SystemExit) as ended:
        if getattr(ended, "code", _INTERRUPTED) != _INTERRUPTED:
            raise
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
