"""How good a policy is: while it trains, and by the protocols of published benchmarks."""
