"""The application: recipes, the training loop, checkpoints, reports, plots and the command line."""
