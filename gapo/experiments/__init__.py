"""Runs around the method: `gapo train`, its tiny model, its report."""
