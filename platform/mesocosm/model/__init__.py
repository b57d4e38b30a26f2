"""World models in torch, and nothing else of this project.

Read `spec` (the data), `net` (the interface of a family, and the losses), `families` (their list:
`ensemble`, `sequence`, `language`) and `world` (how a trained model steps, and its files).
"""
