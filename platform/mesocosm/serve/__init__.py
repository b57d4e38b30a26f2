"""A world on Ray Serve. Read protocol.py, session.py (the replica), world_env.py (the environment)
and ingress.py (HTTP).
"""
