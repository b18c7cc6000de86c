"""Pictures: options of their tasks, pre-trained backbones, and a run in use on new classes."""
