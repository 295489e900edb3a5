"""The command `python -m bench.records`, whose code is harness/records.py."""

from bench.harness.records import main

if __name__ == "__main__":
    main()
