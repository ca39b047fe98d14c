"""What `gapo generate` runs: prompts in, answers out, in the formats that benchmarks read."""
