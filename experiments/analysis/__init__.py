"""What claims are made with: groups of runs, effects and verdicts, closed forms, drawing."""
