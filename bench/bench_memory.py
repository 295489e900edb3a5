"""Records of a former version name this; what they measured is in suites/memory.py."""

from bench.suites.memory import main

if __name__ == "__main__":
    main()
