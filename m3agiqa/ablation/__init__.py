"""What a predictor's parts are worth: one thing is changed at a time, all else like for like.

variations.py (what is changed), data.py (states of the inputs, memory-mapped), parts.py (who is in which part),
heads.py (other sequence models), learn.py (one training), compare.py (what holds up), report.py, run.py.
"""
