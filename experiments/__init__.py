"""Experiments: one file per claim, which reads finished runs and makes its figure and its table.

The runs come from `configs/experiment/<profile>/<claim>.yaml`; the file of the same name here says what is made of
them. It has

    a docstring          the title in the first line, then the claim and what would count for and against it
    figure(runs)         a matplotlib figure
    table(runs)          rows, each a dictionary with the same keys: one row per line of the table

and nothing that trains. A verdict, by a rule fixed before the runs, will be one more function of the same file. Runs
are `bipolar.runs.Run`, read from their folders.
"""
