"""What the command line runs: training and scoring, their settings, models, files and pages."""
