"""A world on Ray Serve; read protocol.py, session.py (replica), client.py and ingress.py (HTTP)."""
