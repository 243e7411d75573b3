"""`python -m lonelypsc` is `lonelypsc`."""

from lonelypsc.cli import main

if __name__ == "__main__":
    main(prog_name="lonelypsc")
