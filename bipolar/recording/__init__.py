"""Recording a run. The run folder's files come first; every other logger is fed from the same records."""
