"""Ray: connections (ray_session.py), clusters/NAME.yaml (spec.py), submission
(submit.py) and the folder that it sends (freeze.py).
"""
