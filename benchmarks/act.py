"""Time the activation functions against their peers; writes results/act.csv. See ``rarefy.act.bench``."""
