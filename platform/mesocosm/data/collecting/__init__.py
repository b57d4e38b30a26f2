"""Collection by workers, in this process or on Ray. Finished episodes are stored before they
count.
"""
