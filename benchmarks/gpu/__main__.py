"""Run as `python -m benchmarks.gpu`."""

from benchmarks.gpu.drive import main

if __name__ == "__main__":
    main()
