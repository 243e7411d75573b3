"""`python -m lonelypss` is `lonelypss`."""

from lonelypss.cli import main

if __name__ == "__main__":
    main(prog_name="lonelypss")
