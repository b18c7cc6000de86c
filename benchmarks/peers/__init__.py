"""Each contender's way to the same meta-gradient: ``make(problem)`` returns a function of nothing."""
