"""Records of a former version name this; what they measured is in suites/train.py."""

from bench.suites.train import main

if __name__ == "__main__":
    main()
