"""Ray: connecting to it (ray_session.py), clusters/NAME.yaml (spec.py), submitting jobs
(submit.py).
"""
