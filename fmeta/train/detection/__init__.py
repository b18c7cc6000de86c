"""Few-shot detection: its recipe, and a meta-learned detector in use."""
