"""How good scores are: figures with intervals, baselines that look at no image, splits and what their parts share.

Knows nothing of Ray, and loads no torch. `m3agiqa.evaluate` puts it together.
"""
