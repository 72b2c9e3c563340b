"""Side-by-side measurements; `python -m benchmarks` (`make bench`) runs them all."""
