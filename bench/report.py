"""The command `python -m bench.report`, whose code is pages/report.py."""

from bench.pages.report import main

if __name__ == "__main__":
    main()
