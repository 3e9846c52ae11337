"""Studies: the same training under several corrections and seeds, compared with error bars.

config.py      what a study is: arms over one base configuration
compare.py     runs what is missing, in parallel processes, and writes the results down
worker.py      one of these processes
gradients.py   bias and variance of each arm's gradient, at the states of a run
moments.py     their statistics
statistics.py  means over seeds, paired differences, verdicts
outcomes.py    what the runs have come to
tables.py      the same as Markdown
"""
