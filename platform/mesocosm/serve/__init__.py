"""A world on Ray Serve: protocol.py, session.py (replica), client.py (WorldVectorEnv), ingress.py
(HTTP).
"""
