"""Records of a former version name this; what they measured is in suites/backward.py."""

from bench.suites.backward import main

if __name__ == "__main__":
    main()
