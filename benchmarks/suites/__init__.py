"""One file a suite: each has ``run(options, results)`` and, where it needs a process of its own, ``job``."""
