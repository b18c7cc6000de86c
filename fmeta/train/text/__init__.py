"""Text: its recipe, and a run in use on new labels."""
