"""The address that `gapo.experiments.score` had before `gapo.runs` and `gapo.study` were rooms of their own."""
